"""A report as Markdown and as HTML: nothing is lost, and nothing from data is markup."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmgraft.evaluation.report.markdown import Table, as_code, fenced, plain, render_html

EVIL = "<script>alert(1)</script> | [x](javascript:y) **b** `c` \\ \"q\" 'r' _i_ &lt; ~~s~~"


def png(width: int = 7, height: int = 5) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), (1, 2, 3)).save(data, "PNG")
    return data.getvalue()


def page(*blocks: object) -> str:
    return "\n\n".join(["# A report", "Of a run.", "## First part", *map(str, blocks)]) + "\n"


TABLE = Table(
    "Scores",
    ["set", "score", "note"],
    [["easy-vqa", "**0.871** (0.850 to 0.890)", "worse"], ["pope", "-", ""]],
    note="Ranges are intervals.",
)


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects them with their texts."""

    VOID = frozenset(["meta", "img", "br"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def test_a_table_in_markdown() -> None:
    assert str(TABLE) == (
        "Scores:\n\n| set | score | note |\n|---|---:|---|\n"
        "| easy-vqa | **0.871** (0.850 to 0.890) | worse |\n| pope | - |  |\n\n"
        "Ranges are intervals."
    )
    assert str(Table("Nothing", ["a"], [])) == ""


def test_a_table_in_html_names_rows_and_columns() -> None:
    read = Reader(render_html(page(TABLE)))
    assert [one.get("scope") for one in read.all("th")] == [None] * 3 + ["row"] * 2
    assert "Scores:" in read.text
    assert "0.871 0.850 to 0.890" in read.text
    cells = [(one.get("class"), one.get("style")) for one in read.all("td")]
    right = "text-align:right"
    assert cells == [(None, right), ("bad", None), (None, right), (None, None)]
    assert {"class": "detail"} in read.all("span")
    assert [one["tabindex"] for one in read.all("div")] == ["0"]


@pytest.mark.parametrize(
    ("texts", "numeric"),
    [
        (["0.1", "−3", "+1,200"], True),
        (["3.1 GB", "812 MB"], True),
        (["1 h 7 min", "48 s"], True),
        (["-", "0.1"], True),
        (["**31.50** (30.60 to 32.40; worse)", "0 (exactly)"], True),
        (["0.2 (one group, no interval)", "3.0e−12"], True),
        (["-", ""], False),
        (["0.1", "worse"], False),
        (["2.13.0"], False),
        (["80 steps"], False),
    ],
)
def test_columns_of_numbers_stand_on_the_right(texts: list[str], numeric: bool) -> None:
    table = str(Table("x", ["a", "b"], [["r", text] for text in texts]))
    assert ("|---|---:|" in table) is numeric


def test_a_column_of_sentences_is_not_squeezed() -> None:
    table = Table("x", ["a", "b"], [["r", "a sentence of more than forty characters, it is"]])
    assert Reader(render_html(page(table))).all("td") == [{"class": "long"}]


@pytest.mark.parametrize(
    ("text", "tone"),
    [
        ("better", "good"),
        ("bit for bit", "good"),
        ("not resolved", "unsure"),
        ("**31.50** (30.60 to 32.40; worse)", "bad"),
        ("the same", None),
        ("no better", None),
    ],
)
def test_a_verdict_has_its_colour(text: str, tone: str | None) -> None:
    (cell,) = Reader(render_html(page(Table("x", ["a", "b"], [["r", text]])))).all("td")
    assert cell.get("class") == tone


def test_an_image_is_inside_the_page_or_linked_to() -> None:
    markdown = page('![Loss of "tune" falls](curves.png)', "![other](sheets/x.png)")
    inside, linked = Reader(render_html(markdown, {"curves.png": png()})).all("img")
    assert inside["alt"] == 'Loss of "tune" falls'
    kind, data = str(inside["src"]).split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == png()
    assert linked["src"] == "sheets/x.png"


def test_nothing_from_data_becomes_markup() -> None:
    evil = plain(EVIL)
    shown = page(
        evil, f"- {evil}", Table(evil, ["a", "b"], [["r", evil]]), f"![{evil}](p.png)",
        fenced(EVIL, "bash"), as_code(EVIL),
    )  # fmt: skip
    read = Reader(render_html(shown, {"p.png": png()}))
    for tag in ("script", "a", "em", "s", "details"):
        assert not read.all(tag), tag
    assert read.text.count("<script>alert(1)</script> | [x](javascript:y) **b** 'c' \\") >= 4
    assert read.text.count("_i_ &lt; ~~s~~") >= 5
    outside = shown.split("```")[0]
    assert "<script" not in outside.replace("\\<", "")
    assert "](java" not in outside.replace("\\]", "")


def test_html_in_the_markdown_is_text() -> None:
    """Whatever a template lets through, nothing but the two lines of a folded table is HTML."""
    read = Reader(render_html("<script>x</script>\n\na <b>c</b> <http://x.y>\n\n<details open>\n"))
    assert not {tag for tag, _ in read.seen} & {"script", "b", "a", "details"}
    assert "<script>x</script>" in read.text
    assert "[y](z)" in Reader(render_html("[y](z)")).text


def test_nothing_is_fetched_and_nothing_runs() -> None:
    html = render_html(page(TABLE, "![alt](p.png)", fenced("curl http://x", "sh")), {"p.png": b"x"})
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert not re.search(r"url\(|@import|<link|<script|\bon[a-z]+=", html)
    assert "prefers-color-scheme: dark" in html
    assert '<html lang="en">' in html
    assert 'name="viewport"' in html


def test_code_cannot_break_out_of_its_fence() -> None:
    assert fenced("a\n```\n# not a heading", "yaml").split("\n") == [
        "````yaml", "a", "```", "# not a heading", "````",
    ]  # fmt: skip


def test_a_folded_table_opens_on_demand() -> None:
    folded = page(Table("Detail", ["a", "b"], [["x", "y"]], note="More.", folded=True))
    assert "Detail:\n\n<details>" in folded
    read = Reader(render_html(folded))
    assert len(read.all("details")) == len(read.all("summary")) == 1
    assert read.text.endswith("Detail: show a b x y More.")
    assert not Reader(render_html(page(TABLE))).all("details")


def test_a_long_page_has_links_to_its_parts() -> None:
    parts = [f"## Part {n}, `and` <more>\n\ntext" for n in range(4)]
    read = Reader(render_html("\n\n".join(["# The *title*", *parts])))
    targets = [one.get("id") for one in read.all("h2")]
    assert targets == [f"part-{n}-and-more" for n in range(4)]
    assert [one["href"] for one in read.all("a")] == [f"#{one}" for one in targets]
    assert read.text.startswith("The title Part 0, and <more> Part 1")
    assert not Reader(render_html(page(TABLE))).all("a")


def test_code_in_a_sentence() -> None:
    shown = f"Workflow {as_code('mm')} on {plain('a | b')}, {as_code('a`b')}."
    assert shown == "Workflow `mm` on a \\| b, `a'b`."
    assert "Workflow <code>mm</code> on a | b, <code>a'b</code>." in render_html(shown)


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Z"]), max_size=60))
def test_any_text_reads_back_from_the_page(text: str) -> None:
    text = " ".join(text.split()).replace("`", "'")
    shown = f"({plain(text)})\n\n{Table('x', ['a', 'b'], [['r', f'({plain(text)})']])}"
    assert Reader(render_html(shown)).text.count(f"({text})") == 2
