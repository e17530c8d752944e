"""Reports as Markdown, made by Jinja templates, and the HTML page rendered from it."""

import base64
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from mmgraft.evaluation.report import words
from mmgraft.frozen import Frozen

if TYPE_CHECKING:
    from jinja2 import Environment
    from markdown_it.token import Token

_SPECIAL = re.compile(r"[\\*\[\]<>|~]|(?<![^\W_])_|_(?![^\W_])|&(?=[#\w])")
_UNIT = "%|s|min|h|h [0-9]+ min|MB|GB"
_NUMBER = re.compile(
    rf"\**[+−-]?[0-9][0-9,]*(\.[0-9]+)?(e[+−-]?[0-9]+)?( ({_UNIT}))?\**( \([^()]*\))?"
)
_VERDICT = re.compile(r"(?:^|\(|; )(better|worse|not resolved|bit for bit)\)?$")
_CLASSES = {"better": "good", "bit for bit": "good", "worse": "bad", "not resolved": "unsure"}
_INTERVAL = re.compile(r'(<td style="text-align:right"[^\n]*?) \(([^()<>\n]+)\)')
_FOLD, _FOLD_END = "<details><summary>show</summary>", "</details>"
_LONG_CELL = 40  # characters: a longer cell is a sentence, whose column is not squeezed


def plain(text: object) -> str:
    """Return text that came from data in one line, with Markdown's signs escaped."""
    line = " ".join(str(text).split()).replace("`", "'")
    return _SPECIAL.sub(r"\\\g<0>", line)


def as_code(text: object) -> str:
    """Return text that came from data in one line, set as code."""
    line = " ".join(str(text).split()).replace("`", "'")
    return f"`{line}`".replace("|", "\\|")


def fenced(text: str, language: str) -> str:
    """Return a text between fences longer than any run of backticks in it."""
    fence = "`" * max([2, *map(len, re.findall(r"`+", text))]) + "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def score_title(name: str) -> str:
    """Return the name of a score as Markdown."""
    return plain(words.score_name(name))


class Table(Frozen):
    """A table of a report; as a string it is Markdown, and empty where it has no rows.

    Attributes:
        caption: What the table shows, in a line.
        columns: Names of the columns.
        rows: Cells in Markdown; the first one names its row.
        note: Sentences below the table.
        folded: Whether a page opens with the table closed.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    folded: bool = False

    def __str__(self) -> str:
        """Return the table with its caption and note as Markdown."""
        if not self.rows:
            return ""
        signs = ["---:" if _is_numeric(cells) else "---" for cells in zip(*self.rows, strict=True)]
        lines = [_row(self.columns), f"|{'|'.join(signs)}|", *map(_row, self.rows)]
        if self.note:
            lines += ["", self.note]
        if self.folded:
            lines = [_FOLD, "", *lines, "", _FOLD_END]
        return "\n".join([f"{self.caption}:", "", *lines])


def _table(lines: str, caption: str, note: str, folded: bool) -> str:
    """Return the table that a template writes line by line, the names of the columns first."""
    columns, *rows = (line.strip()[2:-2].split(" | ") for line in lines.strip().splitlines())
    return str(Table(caption, columns, rows, note, folded))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _is_numeric(cells: Sequence[str]) -> bool:
    """Return whether a column holds numbers, and stands on the right."""
    shown = [cell for cell in cells if cell not in ("", "-")]
    return bool(shown) and all(map(_NUMBER.fullmatch, shown))


def render(template: str, **values: Any) -> str:
    """Render a Markdown template of the package.

    Args:
        template: Its path in the package, such as ``evaluation/report/run.md.jinja``.
        **values: What the template names. Text from data goes through the filters ``plain`` and
            ``code``; ``words`` is :mod:`mmgraft.evaluation.report.words`.
    """
    return _environment().get_template(template).render(**values)


def render_html(markdown: str, images: Mapping[str, bytes] | None = None) -> str:
    """Render a report's Markdown as one HTML page that fetches nothing and runs nothing.

    Args:
        markdown: The report.
        images: PNGs to put into the page, by the file names that the Markdown gives them. Other
            images stay links to files beside the page.
    """
    from markdown_it import MarkdownIt
    from markupsafe import escape

    parser = MarkdownIt("commonmark", {"xhtmlOut": False}).enable("table")
    parser.disable(["link", "autolink", "html_inline"])
    tokens = parser.parse(markdown)
    headings = _decorate(tokens, images or {})
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="scroll" tabindex="0"><table>')
    body = body.replace("</table>", "</table></div>")
    body = _INTERVAL.sub(r'\1 <span class="detail">\2</span>', body)
    page = _environment().get_template("evaluation/report/page.html.jinja")
    title = next((text for tag, _, text in headings if tag == "h1"), "")
    parts = [(anchor, escape(text)) for tag, anchor, text in headings if tag == "h2"]
    return page.render(title=escape(title), parts=parts, body=body)


def _decorate(tokens: "Sequence[Token]", images: Mapping[str, bytes]) -> list[tuple[str, str, str]]:
    """Add anchors, row headings, classes and image data to a page's tokens.

    Returns:
        Tag, anchor and text of every heading.
    """
    headings = []
    for at, token in enumerate(tokens):
        if token.type == "heading_open":
            text = "".join(child.content for child in tokens[at + 1].children or ())
            anchor = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
            token.attrSet("id", anchor)
            headings.append((token.tag, anchor, text))
        elif token.type == "tr_open" and tokens[at + 1].type == "td_open":
            tokens[at + 1].tag = tokens[at + 3].tag = "th"
            tokens[at + 1].attrSet("scope", "row")
        elif token.type == "td_open":
            found = _VERDICT.search(tokens[at + 1].content)
            if found:
                token.attrSet("class", _CLASSES[found[1]])
            elif len(tokens[at + 1].content) > _LONG_CELL and not token.attrs:
                token.attrSet("class", "long")
        elif token.type == "html_block" and token.content.strip() not in (_FOLD, _FOLD_END):
            token.type = "text"  # which is escaped
        for child in token.children or ():
            png = images.get(str(child.attrs.get("src"))) if child.type == "image" else None
            if png is not None:
                data = base64.b64encode(png).decode("ascii")
                child.attrSet("src", f"data:image/png;base64,{data}")
    return headings


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mmgraft", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.globals.update(words=words, plain=plain)
    environment.filters.update(
        plain=plain, code=as_code, fenced=fenced, score_title=score_title, table=_table
    )
    return environment
