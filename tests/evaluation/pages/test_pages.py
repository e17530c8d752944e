"""The same page as Markdown and as HTML: nothing is lost, and nothing from data is markup."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmgraft.evaluation.pages.html import png_size, render_html
from mmgraft.evaluation.pages.markdown import render_markdown
from mmgraft.evaluation.pages.page import (
    Cell,
    Code,
    Page,
    Paragraph,
    Part,
    Picture,
    Points,
    Table,
    as_code,
    plain,
    row,
)

EVIL = "<script>alert(1)</script> | [x](javascript:y) **b** `c` \\ \"q\" 'r'"


def png(width: int = 7, height: int = 5) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), (1, 2, 3)).save(data, "PNG")
    return data.getvalue()


def page(*blocks: object) -> Page:
    return Page("A report", "Of a run.", [Part("First part", blocks)])  # type: ignore[arg-type]


TABLE = Table(
    "Scores",
    ["set", "score", "note"],
    [
        [Cell("easy-vqa"), Cell("0.871", "0.850 to 0.890", strong=True), Cell("worse", tone="bad")],
        [Cell("pope"), Cell("-"), Cell("")],
    ],
    note="Ranges are intervals.",
)


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects them with their texts."""

    VOID = frozenset(["meta", "img"])

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
    assert render_markdown(page(TABLE)) == (
        "# A report\n\nOf a run.\n\n## First part\n\nScores:\n\n"
        "| set | score | note |\n|---|---:|---|\n"
        "| easy-vqa | **0.871** (0.850 to 0.890) | worse |\n| pope | - |  |\n\n"
        "Ranges are intervals.\n"
    )


def test_a_table_in_html_names_rows_and_columns() -> None:
    read = Reader(render_html(page(TABLE)))
    assert [one["scope"] for one in read.all("th")] == ["col"] * 3 + ["row"] * 2
    assert "Scores" in read.text
    assert "0.871 0.850 to 0.890" in read.text
    assert [one.get("class") for one in read.all("td")] == ["number", "bad", "number", None]
    region = next(one for one in read.all("div") if one.get("role") == "region")
    assert (region["tabindex"], region["aria-label"]) == ("0", "Scores")


def test_a_table_without_column_names_has_no_empty_heads() -> None:
    read = Reader(render_html(page(Table("Facts", ["", ""], [row("base", "llama")]))))
    assert [one["scope"] for one in read.all("th")] == ["row"]


@pytest.mark.parametrize(
    ("texts", "numeric"),
    [
        (["0.1", "−3", "+1,200"], True),
        (["3.1 GB", "812 MB"], True),
        (["1 h 7 min", "48 s"], True),
        (["-", "0.1"], True),
        (["-", ""], False),
        (["0.1", "worse"], False),
        (["2.13.0"], False),
        (["80 steps"], False),
    ],
)
def test_columns_of_numbers_stand_on_the_right(texts: list[str], numeric: bool) -> None:
    table = Table("x", ["a", "b"], [row("r", text) for text in texts])
    assert table.numeric == [False, numeric]


def test_a_column_of_sentences_is_not_squeezed() -> None:
    table = Table("x", ["a", "b"], [row("a sentence of more than forty characters, it is", "0.1")])
    assert table.long == [True, False]
    assert Reader(render_html(page(table))).all("th")[2]["class"] == "long"
    assert Table("x", ["a"], []).long == Table("x", ["a"], []).numeric == [False]


def test_a_picture_is_inside_the_page_and_beside_the_markdown() -> None:
    picture = Picture("curves", png(), 'Loss of "tune" falls', "Falling.")
    read = Reader(render_html(page(picture)))
    (image,) = read.all("img")
    assert image["alt"] == 'Loss of "tune" falls'
    assert (image["width"], image["height"]) == ("7", "5")
    kind, data = str(image["src"]).split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == picture.png
    assert '![Loss of "tune" falls](curves.png)\n\nFalling.' in render_markdown(page(picture))
    assert page(picture).pictures == [picture]
    assert png_size(png(300, 20)) == (300, 20)


def test_nothing_from_data_becomes_markup() -> None:
    shown = page(
        Paragraph(plain(EVIL)), Points([plain(EVIL)]), Table(plain(EVIL), ["a"], [[Cell(EVIL)]]),
        Picture("p", png(), plain(EVIL), plain(EVIL)), Code(EVIL),
    )  # fmt: skip
    html = render_html(shown)
    read = Reader(html)
    assert not read.all("script")
    assert not read.all("a")
    assert read.text.count("<script>alert(1)</script> | [x](javascript:y) **b**") >= 5
    outside = render_markdown(shown).split("```")[0]
    assert "<script" not in outside.replace("\\<", "")
    assert "](java" not in outside.replace("\\]", "")


def test_nothing_is_fetched_and_nothing_runs() -> None:
    html = render_html(page(TABLE, Picture("p", png(), "alt"), Code("curl http://x")))
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert not re.search(r"url\(|@import|<link|<script|\bon[a-z]+=", html)
    assert "prefers-color-scheme: dark" in html
    assert '<html lang="en">' in html
    assert 'name="viewport"' in html


def test_code_cannot_break_out_of_its_fence() -> None:
    lines = render_markdown(page(Code("a\n```\n# not a heading", "yaml"))).split("\n")
    assert lines[6:11] == ["````yaml", "a", "```", "# not a heading", "````"]


def test_what_is_folded_opens_on_demand() -> None:
    folded = Table("Detail", ["a", "b"], [row("x", "y")], folded=True)
    read = Reader(render_html(page(folded)))
    assert len(read.all("details")) == len(read.all("summary")) == 1
    assert not Reader(render_html(page(TABLE))).all("details")


def test_a_long_page_has_links_to_its_parts() -> None:
    parts = [Part(f"Part {n}, and more", [Paragraph("text")]) for n in range(4)]
    read = Reader(render_html(Page("Title", "lead", parts, "the end")))
    targets = {one.get("id") for one in read.all("h2")}
    assert [str(one["href"])[1:] for one in read.all("a")] == [part.anchor for part in parts]
    assert targets == {part.anchor for part in parts}
    assert len(read.all("h1")) == 1
    assert read.text.endswith("the end")


def test_code_in_a_sentence() -> None:
    shown = page(Paragraph(f"Workflow {as_code('mm')} on a | b, {as_code('a`|b')}."))
    assert "Workflow `mm` on a \\| b, `a'\\|b`." in render_markdown(shown)
    assert "Workflow <code>mm</code> on a | b, <code>a&#39;|b</code>." in render_html(shown)


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Z"]), max_size=60))
def test_any_text_reads_back_from_the_page(text: str) -> None:
    text = plain(text)
    assert f"({text})" in Reader(render_html(page(Paragraph(f"({text})")))).text
