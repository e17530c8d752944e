"""The one row type: a conversation, and where it came from.

Of a row that cannot be used it is said why, in the log of a run that leaves it out.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from mmgraft.data.chat.turns import has_image
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen


class Row(Frozen):
    """One conversation.

    Attributes:
        id: The source's own, else its position.
        messages: ``{"role", "content"}``, content a text or a list of text and image parts; an
            image is ``{"type": "image", "image": path or data URI}``, its path resolved.
        file: Where the row was read.
        place: Where in the file: "line 12" or "row 12", counted from 1.
        tools: For the chat template.
        layout: That it was read in, and why.
        images_first: Its images had no place, and were put before the first turn of a user.
    """

    id: str
    messages: Sequence[dict[str, Any]]
    file: str = ""
    place: str = ""
    tools: Sequence[Any] | None = None
    layout: str = ""
    images_first: bool = False

    @property
    def has_image(self) -> bool:
        """Return whether any message has an image part."""
        return has_image(self.messages)

    @property
    def where(self) -> str:
        """The row as an error names it: "train.json, row 12 (id abc)"."""
        place = ", ".join(part for part in (self.file, self.place) if part)
        return f"{place} (id {self.id})" if place else f"row {self.id}"


#: Rows that are said one by one; the others are in the log alone.
_SAID = 5


OnBadRow = Literal["error", "skip"]
BAD_ROWS = "bad_rows.jsonl"
#: Prefix of a data set of the Hub: hub:OWNER/NAME.
HUB = "hub:"


class BadRow(Frozen):
    """One row, and why it cannot be used.

    Attributes:
        file: Where it was read, as a whole path.
        place: Where in the file: "line 12" or "row 12".
        id: The row's, None where it has none that can be read.
        fault: "missing", "broken", "enormous" or "outside" of an image; "row" of a row that is
            not written as one should be; "empty" of one with nothing to learn.
        reason: The whole message.
    """

    file: str
    place: str
    id: str | None
    fault: str
    reason: str

    @classmethod
    def of(cls, row: Row, error: UsageError, fault: str = "row") -> "BadRow":
        """Return the bad row of a row that was read, and the error that it gave."""
        return cls(absolute(row.file), row.place, row.id, fault_of(error, fault), str(error))

    @property
    def key(self) -> tuple[str, str]:
        """Return what tells rows apart: file and place."""
        return self.file, self.place

    def as_dict(self) -> dict[str, Any]:
        """Give what is written of it."""
        return asdict(self)


def fault_of(error: UsageError, otherwise: str = "row") -> str:
    """Return what an error says is wrong, in one word."""
    return getattr(error, "fault", otherwise)


def absolute(file: str) -> str:
    """Return a file by a path that means the same from any folder; a set of the Hub by its name."""
    return file if file.startswith(HUB) else os.path.abspath(file)


def key_of(row: Row) -> tuple[str, str]:
    """Return the key of a row that was read, as ``BadRow.key``."""
    return absolute(row.file), row.place


class BadRowLog:
    """``bad_rows.jsonl`` of a run: each bad row once a stage, in the order in which they were met.

    A line has what a ``BadRow`` has, and ``stage`` and ``step``: both null for a row that was left
    out before the training began, else where the next good row first took its place. A run that
    goes on leaves out exactly the rows of its log, and those that it meets itself.

    Args:
        run: The run folder.
        new: Begin as an empty log, whatever an earlier training left there.
        announce: Is called with the first few, for a person to see.
    """

    def __init__(
        self, run: Path, new: bool = False, announce: Callable[[str], None] = lambda text: None
    ) -> None:
        self.path = run / BAD_ROWS
        self.announce = announce
        self._said = 0
        self._seen: dict[tuple[str | None, tuple[str, str]], BadRow] = {}
        if not new and self.path.is_file():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                self._read(text)

    def _read(self, text: str) -> None:
        with suppress(ValueError, KeyError, TypeError):  # a kill may cut a line short
            line = json.loads(text)
            row = BadRow(**{field.name: line[field.name] for field in fields(BadRow)})
            self._seen[(line["stage"], row.key)] = row

    def add(
        self, rows: Iterable[BadRow], stage: str | None = None, step: int | None = None
    ) -> list[BadRow]:
        """Write the rows that are new; gives these."""
        new: list[BadRow] = []
        for row in rows:
            if (stage, row.key) not in self._seen:
                self._seen[(stage, row.key)] = row
                new.append(row)
        if new:
            lines = ({**row.as_dict(), "stage": stage, "step": step} for row in new)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            if _torn(self.path):
                text = "\n" + text
            # One write at the end of the file: ranks share it.
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        return new

    def left_out(self, stage: str | None) -> set[tuple[str, str]]:
        """Return the keys of a stage's rows; None: of those left out before the training began."""
        return {key for of, key in self._seen if of == stage}

    def put(
        self, rows: Sequence[BadRow], stage: str | None = None, step: int | None = None
    ) -> None:
        """Log rows that are new, and say so."""
        new = self.add(rows, stage, step)
        for row in new[: max(0, _SAID - self._said)]:
            self.announce(f"left out: {row.reason}")
        if self._said < _SAID <= self._said + len(new):
            self.announce(f"further bad rows are only in {self.path}")
        self._said += len(new)

    def count(self, stage: str) -> int:
        """Count the rows that a stage did without, those left out before it began included."""
        log = BadRowLog(self.path.parent)  # of all ranks
        return len(log.left_out(None) | log.left_out(stage))


def _torn(path: Path) -> bool:
    """Tell whether a kill cut the last line short."""
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        return False
