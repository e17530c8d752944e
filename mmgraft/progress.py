"""Say what is done, and show how far long work is: a bar on a terminal, lines in a log.

A library says nothing: the command line shows the logger ``mmgraft``, and calls ``show_on``.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

#: Seconds between two lines of a log.
EVERY = 10.0
#: Seconds after which work is long enough for a bar.
_SOON = 1.0

_log = logging.getLogger("mmgraft")
_works: "list[Work]" = []  # the innermost last, which is the one shown
_console: "Callable[[], Console] | None" = None


def say(text: str) -> None:
    """Say what is done or was found, to the logger ``mmgraft`` at the level of information."""
    _log.info("%s", text)


class Work:
    """One piece of work; a call says how much of it is done."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.done, self.total = 0, 0
        self._began = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` is done."""
        self.done, self.total = done, total

    def line(self) -> str:
        """Return how far it is, in words."""
        seconds = round(time.monotonic() - self._began)
        count = f" {self.done:,}" if self.done else ""
        count += f" of {self.total:,}" if self.total else ""
        count += "," if count else ""
        return f"{self.what}:{count} {seconds // 60}:{seconds % 60:02}"


def show_on(console: "Callable[[], Console] | None") -> None:
    """Show work on a console from now on; None shows none."""
    global _console
    _console = console


@contextmanager
def working(what: str, bar: bool = True) -> Iterator[Work]:
    """Show how far the work in the block is, once it takes long.

    Args:
        what: The work, in words.
        bar: Show it on a terminal too; False where a library shows its own.
    """
    work, stop = Work(what), Event()
    _works.append(work)
    watch = None
    if _console is not None and len(_works) == 1:
        watch = Thread(target=_watch, args=(stop, _console(), bar), daemon=True)
        watch.start()
    try:
        yield work
    finally:
        stop.set()
        if watch is not None:
            watch.join()
        _works.remove(work)


def counted(what: str, items: Iterable[T]) -> Iterator[T]:
    """Yield items, and show how many are done."""
    total = len(items) if isinstance(items, Sized) else 0
    with working(what) as work:
        for number, item in enumerate(items, start=1):
            yield item
            work(number, total)


def _watch(stop: Event, console: "Console", bar: bool) -> None:
    if not console.is_terminal:
        while not stop.wait(EVERY):
            console.print(_works[-1].line(), markup=False, highlight=False)
        return
    if not bar or stop.wait(_SOON):
        return
    from rich.errors import LiveError
    from rich.progress import BarColumn, Progress, TextColumn

    columns = BarColumn(), TextColumn("{task.description}", markup=False)
    shown = Progress(*columns, console=console, transient=True)
    task = shown.add_task("", total=None)
    with suppress(LiveError), shown:  # a training shows its own
        while not stop.wait(0.2):
            work = _works[-1]
            shown.update(task, description=work.line(), completed=work.done)
            shown.update(task, total=work.total or None)
