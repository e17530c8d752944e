"""Show how far long work is: lines in a log, a bar on a terminal, nothing from the library."""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from mmgraft import progress
from mmgraft.basefiles import fingerprint, load_whole, resolve
from mmgraft.progress import counted, show_on, working
from tiny import save_base
from waiting import wait_until


def until(done: Callable[[], object]) -> None:
    """Wait for another thread, however slow the machine is."""
    wait_until(done, "what is said")


@pytest.fixture
def console(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Console]:
    """Show work at once, and every hundredth of a second."""
    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setattr(progress, "_SOON", 0.01)
    terminal = getattr(request, "param", False)
    made = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    show_on(lambda: made)
    yield made
    show_on(None)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("console", [False, True], indirect=True, ids=["log", "terminal"])
def test_what_is_done_is_said_of_the_innermost_work(console: Console) -> None:
    with working("exporting"):
        until(lambda: re.search(r"exporting: \d+:\d\d", said(console)))
        with working("writing shards") as work:
            work(1_234, 5_000)
            until(lambda: "writing shards: 1,234 of 5,000, " in said(console))
    assert ("━" in said(console) or "\x1b" in said(console)) == console.is_terminal
    assert not [one for one in threading.enumerate() if one.name.endswith("(_watch)")]


def test_a_line_says_what_is_done_and_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    work = progress.Work("hashing")
    assert work.line() == "hashing: 0:00"
    now[0] += 3725.6
    assert work.line() == "hashing: 62:06"
    work(1_234, 0)
    assert work.line() == "hashing: 1,234, 62:06"
    work(1_234, 5_000)
    assert work.line() == "hashing: 1,234 of 5,000, 62:06"


def test_every_item_is_counted(console: Console) -> None:
    for item in counted("reading", ["a", "b", "c"]):
        if item == "c":
            until(lambda: "reading: 2 of 3," in said(console))
    for at in counted("reading lines", iter(range(3))):
        if at == 2:
            until(lambda: re.search(r"reading lines: 2, \d+:\d\d", said(console)))


def test_a_failure_ends_it(console: Console) -> None:
    with pytest.raises(ZeroDivisionError), working("failing"):
        raise ZeroDivisionError
    assert not progress._works
    before = said(console)
    with working("next"):
        until(lambda: "next" in said(console))
    assert "failing" not in said(console)[len(before) :]


def test_a_library_says_nothing(monkeypatch, capfd) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with working("loading"):
        time.sleep(0.1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bar", [True, False])
def test_a_library_with_bars_of_its_own_keeps_the_terminal(bar: bool, monkeypatch) -> None:
    monkeypatch.setattr(progress, "_SOON", 0.01)
    out = Console(file=io.StringIO(), force_terminal=True, width=100)
    show_on(lambda: out)
    with working("uploading", bar=bar):
        if bar:
            until(lambda: "uploading" in said(out))
        else:
            time.sleep(0.3)
    show_on(None)
    assert ("uploading" in said(out)) == bar


def test_loading_counts_weights_and_hashing_tensors(tmp_path: Path, monkeypatch) -> None:
    seen: list[tuple[str, int, int]] = []
    call = progress.Work.__call__

    def watched(work: progress.Work, done: int, total: int) -> None:
        seen.append((work.what, done, total))
        call(work, done, total)

    monkeypatch.setattr(progress.Work, "__call__", watched)
    files = resolve(save_base(tmp_path / "base", "llama", tokenizer=False))
    load_whole(files)
    loading = [(done, total) for what, done, total in seen if what == f"loading {files.id}"]
    assert len(loading) > 10
    assert {total for _, total in loading} == {loading[-1][0] + 1}
    seen.clear()
    tensors = fingerprint(files, full=True)["tensors"]
    assert seen[-1] == (f"hashing {files.id}", len(tensors), len(tensors))


def test_the_command_line_shows_it_and_only_the_first_process(cli, monkeypatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr("mmgraft.cli.app.show_on", shown.append)
    cli("methods")
    assert callable(shown[0])
    assert shown[1:] == [None]
    shown.clear()
    monkeypatch.setitem(os.environ, "RANK", "1")
    cli("methods")
    assert set(shown) == {None}
