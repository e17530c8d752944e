"""What a report page is made of, before it is HTML or Markdown.

Texts and cells are plain, but for `code` between backticks; what comes from data goes through
`plain`, which leaves no backtick in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["", "good", "bad", "unsure"]
SENTENCE = 40
"""Characters from which on a cell's text is a sentence, and not a name or a number."""

_UNIT = "%|s|min|h|h [0-9]+ min|MB|GB"
_NUMBER = re.compile(rf"[+−-]?[0-9][0-9,]*(\.[0-9]+)?(e[+−-]?[0-9]+)?( ({_UNIT}))?")


def plain(text: object) -> str:
    """A text that came from data, in one line and without markup."""
    return " ".join(str(text).split()).replace("`", "'")


def as_code(text: object) -> str:
    """The same, set as code."""
    return f"`{plain(text)}`"


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: What it says.
        detail: Said after it and smaller, such as an interval.
        tone: Colours the text. It repeats what a word says, for no colour is seen by everyone.
        strong: Bold, such as the score that is the point of its row.
    """

    text: str
    detail: str = ""
    tone: Tone = ""
    strong: bool = False

    def __str__(self) -> str:
        return f"{self.text} ({self.detail})" if self.detail else self.text


@dataclass(frozen=True)
class Paragraph:
    """A few sentences."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Points:
    """Sentences one below the other."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns; the first cell names its row.

    Attributes:
        columns: Their names; all empty where the rows say enough.
        caption: What it shows, in a line.
        folded: Whether the page opens with it closed: detail that few look up.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers alone, and stand on the right."""
        columns = zip(*([cell.text for cell in cells] for cells in self.rows), strict=True)
        found = [
            any(map(_NUMBER.fullmatch, texts))
            and all(text in ("", "-") or _NUMBER.fullmatch(text) for text in texts)
            for texts in columns
        ]
        return found or [False] * len(self.columns)

    @property
    def long(self) -> list[bool]:
        """Which columns hold sentences, and are not to be squeezed."""
        columns = zip(*([cell.text for cell in cells] for cells in self.rows), strict=True)
        found = [any(len(text) > SENTENCE for text in texts) for texts in columns]
        return found or [False] * len(self.columns)


@dataclass(frozen=True)
class Picture:
    """A PNG; `name` is its file beside the Markdown, `alt` what it shows, in words.

    `embedded` puts it into the HTML page; else the page shows the file by a link, and whoever gets
    the page alone does not get the picture.
    """

    name: str
    png: bytes = field(repr=False)
    alt: str
    caption: str = ""
    embedded: bool = True


@dataclass(frozen=True)
class Code:
    """Lines to be copied as they are."""

    text: str
    language: str = "bash"


Block = Paragraph | Points | Table | Picture | Code


@dataclass(frozen=True)
class Part:
    """A heading with what stands below it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """Its place in the page's address."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    lead: str
    parts: Sequence[Part]
    footer: str = ""

    @property
    def pictures(self) -> list[Picture]:
        """All of them, in order."""
        return [one for part in self.parts for one in part.blocks if isinstance(one, Picture)]


def row(*cells: Cell | str | int) -> list[Cell]:
    """Cells of one row, from texts where nothing more is said of them."""
    return [
        one if isinstance(one, Cell) else Cell(f"{one:,}" if isinstance(one, int) else one)
        for one in cells
    ]
