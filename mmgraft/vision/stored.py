"""An image inside a file of many: a member of a tar, a cell of a table."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StoredImage:
    """Place of an image's bytes, which are read on demand.

    Two are the same where their names are.

    Attributes:
        name: As an error says it: "shard.tar/0001.jpg".
        data: The bytes, or a buffer of a file that is mapped into memory; None: they are in
            ``file``.
        file: That holds them.
        offset: Of the first byte in ``file``.
        size: In bytes.
    """

    name: str
    data: Any = field(default=None, compare=False, repr=False)
    file: str = field(default="", compare=False)
    offset: int = field(default=0, compare=False)
    size: int = field(default=0, compare=False)

    def read(self) -> bytes:
        """Return the bytes of the image.

        Raises:
            OSError: The file cannot be read; EOFError, if it has become shorter.
        """
        if self.data is not None:
            return bytes(self.data)
        with Path(self.file).open("rb") as file:
            file.seek(self.offset)
            found = file.read(self.size)
        if len(found) < self.size:
            raise EOFError(f"{self.file} is shorter than it was")
        return found

    def open(self) -> io.BytesIO:
        """Return the bytes as a file."""
        return io.BytesIO(self.read())

    def digest(self) -> str:
        """SHA-256 of the bytes, which is the same in whatever file they lie."""
        return hashlib.sha256(self.read()).hexdigest()

    def __str__(self) -> str:
        return self.name
