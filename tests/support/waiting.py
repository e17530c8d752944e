"""Waiting for what another process does: for the event, never for a time that should be enough."""

from __future__ import annotations

import time
from collections.abc import Callable

LAST = 1800.0
"""Seconds after which nothing will come any more; no machine is that busy."""


def wait_until(happened: Callable[[], object], what: str) -> None:
    """Return as soon as ``happened()`` is true.

    Raises:
        AssertionError: It never was; says what did not happen.
    """
    due = time.monotonic() + LAST
    while not happened():
        assert time.monotonic() < due, f"{what}: it never came"
        time.sleep(0.01)
