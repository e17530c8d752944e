"""Stops a save at every step that it takes on the disk, as a kill or a full disk does.

A kill is played: from its moment on nothing that the process does reaches the disk any more, so
that no cleaning up can help. Real kills are in `tests/model/test_saving.py` too, at random times.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_STEPS: list[tuple[Any, str]] = [
    *((os, name) for name in ("fsync", "open", "unlink", "rmdir", "chmod")),
    *((Path, name) for name in ("mkdir", "rename", "replace", "unlink", "chmod", "write_text")),
]


class Killed(BaseException):
    """The process is gone."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Play a kill before the given step on the disk; gives a function that tells if it came."""
    taken = 0

    def act() -> None:
        nonlocal taken
        taken += 1
        if taken >= step:
            raise Killed

    _watch(act, monkeypatch)
    return lambda: taken >= step


def full_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Let the disk be full in the given step, and in no other."""
    taken = 0

    def act() -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            raise OSError(errno.ENOSPC, "No space left on device")

    _watch(act, monkeypatch)
    return lambda: taken >= step


def _watch(act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def watched(original: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            act()
            return original(*args, **kwargs)

        return step

    for owner, name in _STEPS:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))


def every_step(
    begin: Callable[[int, pytest.MonkeyPatch], Callable[[], bool]], save: Callable[[], None]
) -> Iterator[BaseException | None]:
    """Save again and again, stopped one step later each time, until a save is not stopped.

    Yields:
        What the save raised, after each; the caller looks at what is on the disk.
    """
    step = 0
    came = True
    while came:
        step += 1
        assert step < 1000
        raised: BaseException | None = None
        with pytest.MonkeyPatch.context() as patch:
            stopped = begin(step, patch)
            try:
                save()
            except (Killed, Exception) as error:
                raised = error
            came = stopped()
        yield raised
    assert step > 5, "hardly anything was watched"
