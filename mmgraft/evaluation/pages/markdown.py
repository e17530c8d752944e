"""A page as Markdown, as GitHub and the Hub show it; pictures lie beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mmgraft.evaluation.pages.page import Block, Cell, Code, Page, Paragraph, Picture, Points, Table

_SPECIAL = re.compile(r"([\\*\[\]<>|])")


def render_markdown(page: Page) -> str:
    """The page; a picture is referred to by its name, so the files must lie beside it."""
    lines = [f"# {_inline(page.title)}", "", _inline(page.lead), ""]
    for part in page.parts:
        lines += [f"## {_inline(part.title)}", ""]
        for block in part.blocks:
            lines += [*block_lines(block), ""]
    if page.footer:
        lines += [_inline(page.footer), ""]
    return "\n".join(lines)


def block_lines(block: Block) -> list[str]:
    """The lines of one block."""
    if isinstance(block, Paragraph):
        return [_inline(block.text)]
    if isinstance(block, Points):
        return [f"- {_inline(item)}" for item in block.items]
    if isinstance(block, Code):
        return fenced(block.text, block.language)
    if isinstance(block, Picture):
        caption = ["", _inline(block.caption)] if block.caption else []
        return [f"![{_inline(block.alt)}]({block.name}.png)", *caption]
    return list(_table(block))


def fenced(text: str, language: str) -> list[str]:
    """A text between fences longer than any run of backticks inside."""
    fence = "`" * max([2, *map(len, re.findall(r"`+", text))]) + "`"
    return [f"{fence}{language}", *text.rstrip("\n").split("\n"), fence]


def _table(table: Table) -> Iterator[str]:
    yield f"{_inline(table.caption)}:"
    yield ""
    yield _row([_inline(name) for name in table.columns])
    yield "|" + "|".join("---:" if numeric else "---" for numeric in table.numeric) + "|"
    for cells in table.rows:
        yield _row([_cell(cell) for cell in cells])
    if table.note:
        yield ""
        yield _inline(table.note)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    text = _inline(cell.text)
    text = f"**{text}**" if cell.strong and text else text
    return f"{text} ({_inline(cell.detail)})" if cell.detail else text


def _inline(text: str) -> str:
    """Markup signs are escaped outside `code`; a bar ends a cell even inside it."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:  # a backtick without its partner
        pieces = [text.replace("`", "'")]
    return "`".join(
        piece.replace("|", "\\|") if place % 2 else _SPECIAL.sub(r"\\\1", piece)
        for place, piece in enumerate(pieces)
    )
