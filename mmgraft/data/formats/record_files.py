"""Files of JSON records that are read one record at a time: lines, or one list."""

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.vision.images import StoredImage

_CHUNK = 1 << 20
#: Bytes that are read at a time, of a whole file and of one record.
_SHORT = 1 << 14
#: Characters of one record of a list; what is longer is taken for a file that is cut short.
_LONGEST = 64 << 20
_SPACE = " \t\n\r"
_NESTED = "lists in lists, deeper than can be read; write a row"
_DIGITS = "a number of thousands of digits; write it as a text, or leave it out"


class Record(Frozen):
    """One record.

    Attributes:
        data: What it says.
        images: That lie beside it, by name; None where images are files.
    """

    data: Any
    images: Mapping[str, StoredImage] | None = None


class _Twice(ValueError):
    """A key stands twice in one object."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON (``object_pairs_hook``); of two values for one key one would be lost.

    Raises:
        ValueError: A key stands twice.
    """
    if len(made := dict(pairs)) < len(pairs):
        raise _Twice("an object in which one key stands twice; write each key once")
    return made


class Found(Frozen):
    """A record that was met while a file was read from its beginning to its end.

    Attributes:
        position: What ``RecordFile.read`` finds it by.
        number: Counted from 1, in the file's ``unit``.
        record: The record, or why it cannot be read.
    """

    position: int
    number: int
    record: Record | UsageError


class RecordFile(Protocol):
    """A file of records of which each can be read by itself. It keeps no record in memory."""

    #: As errors name it.
    file: str
    #: Unit that its numbers count: "line", "row" or "sample".
    unit: str

    def scan(self) -> Iterator[Found]:
        """Yield all records in order.

        Raises:
            UsageError: The file as a whole cannot be read.
        """
        ...

    def read(self, position: int, number: int) -> Record:
        """Read one record.

        Raises:
            UsageError: It is not there any more.
        """
        ...


class Stamp(Frozen):
    """Size and time of a file, by which a change is noticed."""

    size: int
    time: int

    @classmethod
    def of(cls, file: str | Path) -> "Stamp":
        """Take the stamp of a file as it is now."""
        stat = Path(file).stat()
        return cls(stat.st_size, stat.st_mtime_ns)


def changed(file: str) -> UsageError:
    """Make the error for a file that is not as it was when its rows were counted."""
    return UsageError(
        f"{file} has changed since its rows were counted; leave files as they are while they are "
        "trained on, and begin again"
    )


class StampedFile:
    """Base of readers of lines, lists and tars: one file, whose change is noticed."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.stamp = Stamp.of(file)

    def open(self) -> IO[bytes]:
        """Open the file, for a read by position.

        Raises:
            UsageError: It has changed, or is gone.
        """
        try:
            if Stamp.of(self.file) != self.stamp:
                raise changed(self.file)
            return Path(self.file).open("rb")
        except OSError as error:
            reason = f"{self.file} cannot be read any more ({error}); put it back"
            raise UsageError(reason) from None


class LineFile(StampedFile):
    """One JSON object a line; a record's position is its first byte's."""

    unit = "line"

    def scan(self) -> Iterator[Found]:
        """Yield all lines that are not empty."""
        with self.open() as file:
            position = 0
            for number, line in enumerate(file, start=1):
                if found := self._record(line, number):
                    yield Found(position, number, found)
                position += len(line)

    def read(self, position: int, number: int) -> Record:
        """Read the line that begins there."""
        with self.open() as file:
            file.seek(position)
            found = self._record(file.readline(), number)
        if not isinstance(found, Record):
            raise changed(self.file)
        return found

    def _record(self, line: bytes, number: int) -> Record | UsageError | None:
        """Return what a line says, or why it cannot be read; None of an empty one."""
        where = f"{self.file}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            return Record(json.loads(text, object_pairs_hook=once)) if text.strip() else None
        except UnicodeDecodeError as error:
            return UsageError(f"{where}: not UTF-8 text ({error.reason}); convert it")
        except json.JSONDecodeError as error:
            return UsageError(
                f"{where}: not JSON ({error.msg}); write one object a line, or the whole file as "
                "one list"
            )
        except ValueError as error:  # else Python reads no number of so many digits
            return UsageError(f"{where}: {error if isinstance(error, _Twice) else _DIGITS}")
        except RecursionError:
            return UsageError(f"{where}: {_NESTED}")


class ListFile(StampedFile):
    """One JSON list of objects, read a piece at a time."""

    unit = "row"

    def scan(self) -> Iterator[Found]:
        """Yield all objects of the list."""
        with self.open() as file:
            begins = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
            file.seek(len(codecs.BOM_UTF8) if begins else 0)
            text = _Window(self, file, file.tell(), _CHUNK)
            text.skip("[")
            number = 0
            while not (number == 0 and text.peek() == "]"):
                position = text.offset
                number += 1
                yield Found(position, number, Record(text.value()))
                if text.peek() != ",":
                    break
                text.skip(",")
                text.peek()
            if text.peek() != "]":
                text.fail("Expecting ',' delimiter")
            text.skip("]")
            if text.peek():
                text.fail("Extra data")

    def read(self, position: int, number: int) -> Record:
        """Read the object that begins there."""
        with self.open() as file:
            file.seek(position)
            return Record(_Window(self, file, position, _SHORT).value())


class _Window:
    """A moving piece of a text file, that knows where in the file's bytes it stands."""

    def __init__(self, source: ListFile, file: IO[bytes], offset: int, chunk: int) -> None:
        self.source = source
        self.file = file
        self.offset = offset  # of the next character, in bytes
        self.text, self.at, self.line = "", 0, 1
        self.decode = codecs.getincrementaldecoder("utf-8")()
        self.json = json.JSONDecoder(object_pairs_hook=once)
        self.chunk = chunk
        self.ended = False

    def peek(self) -> str:
        """Return the next character that is no white space; none at the end."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in _SPACE:
                end += 1
            self._move(end)
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def skip(self, sign: str) -> None:
        """Pass a character."""
        if self.peek() != sign:
            self.fail(f"Expecting {sign!r}")
        self._move(self.at + 1)

    def value(self) -> Any:
        """Return the JSON value that begins here."""
        self.peek()
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > _LONGEST or not self._more():
                    self.fail(error.msg, error.pos)
                continue
            except (ValueError, RecursionError) as error:
                known = _NESTED if isinstance(error, RecursionError) else _DIGITS
                said = error if isinstance(error, _Twice) else known
                raise UsageError(f"{self.source.file}, line {self.line}: {said}") from None
            if end < len(self.text) or not self._more():  # else a number might go on
                self._move(end)
                return value

    def fail(self, reason: str, at: int | None = None) -> NoReturn:
        """Raise the error of a list that is no JSON."""
        line = self.line + self.text.count("\n", self.at, at)
        raise UsageError(f"{self.source.file}, line {line}: not JSON ({reason}); correct the file")

    def _move(self, at: int) -> None:
        passed = self.text[self.at : at]
        self.offset += len(passed.encode())
        self.line += passed.count("\n")
        self.at = at

    def _more(self) -> bool:
        """Read on; false at the end of the file."""
        if self.ended:
            return False
        data = self.file.read(max(self.chunk, len(self.text) - self.at))  # twice as much again
        self.ended = not data
        try:
            self.text = self.text[self.at :] + self.decode.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{self.source.file}, line {self.line} or after: not UTF-8 text ({error.reason}); "
                "convert the file"
            ) from None
        self.at = 0
        return True


def json_file(file: str) -> LineFile | ListFile:
    """Return a file of lines or a list, as its first character says."""
    source = LineFile(file)
    with source.open() as opened:
        text = opened.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8).lstrip()
        while not text and (data := opened.read(1 << 12)):
            text = data.lstrip()
    return ListFile(file) if text.startswith(b"[") else source
