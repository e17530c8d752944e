"""Bad rows of a training that skips them: each is logged and said, none is lost in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mmgraft.data.bad_rows import BadRow, BadRowLog

_SAID = 5
"""Rows that are said one by one; the others are in the log alone."""


class BadRows(BadRowLog):
    """The log of a run, and what a person sees of it.

    Args:
        run: The run folder.
        announce: Is called with the first few.
        resume: Go on with the log that is there.
    """

    def __init__(self, run: Path, announce: Callable[[str], None], resume: bool) -> None:
        super().__init__(run, new=not resume)
        self.run = run
        self.announce = announce
        self._said = 0

    def put(
        self, rows: Sequence[BadRow], stage: str | None = None, step: int | None = None
    ) -> None:
        """Log rows that are new, and say so; see :class:`BadRowLog`."""
        new = self.add(rows, stage, step)
        for row in new[: max(0, _SAID - self._said)]:
            self.announce(f"left out: {row.reason}")
        if self._said < _SAID <= self._said + len(new):
            self.announce(f"further bad rows are only in {self.path}")
        self._said += len(new)

    def count(self, stage: str) -> int:
        """Count the rows that a stage did without, those left out before it began included."""
        log = BadRowLog(self.run)  # of all ranks
        return len(log.left_out(None) | log.left_out(stage))
