"""A bug that can be put in."""

from __future__ import annotations

from typing import NamedTuple


class Patch(NamedTuple):
    """A small bug.

    Attributes:
        what: The bug in words.
        file: Below ``mmgraft/``.
        old: Text that stands in it exactly once.
        new: What stands there instead.
        tests: What pytest is called with, below ``tests/``; one of them must fail.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str
