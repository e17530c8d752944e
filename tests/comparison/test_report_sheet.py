"""The sheet of boxes in a comparison: each arm's IoU in words, and whose pictures are inside."""

from __future__ import annotations

from pathlib import Path

import pytest

from box_example import BOX, GPL, SIZE, make_boxes
from mmgraft.comparison.answers import SetAnswers
from mmgraft.comparison.report_sheet import sheet_blocks
from mmgraft.evaluation.boxes import format_box
from mmgraft.evaluation.item_files import read_items
from mmgraft.evaluation.pages.html import render_html
from mmgraft.evaluation.pages.page import Page, Part, Picture, Table


@pytest.mark.parametrize(("licence", "embedded"), [("MIT", True), (None, True), (GPL, False)])
def test_boxes_of_arms_have_their_iou_and_gpl_pictures_are_linked(
    tmp_path: Path, licence: str | None, embedded: bool
) -> None:
    spec = make_boxes(tmp_path / "set", licence)
    items = read_items(spec)
    said = {"iaa": [format_box(BOX, "unit", SIZE)] * 3, "llava": ["there"] * 3}
    picture, table = sheet_blocks(SetAnswers(spec, items, [], said, {}, {}, None, {}))
    assert isinstance(picture, Picture)
    assert isinstance(table, Table)
    for _, _, iaa, llava in table.rows:
        assert (iaa.detail, iaa.tone) == ("right, IoU 1.00", "good")
        assert (llava.text, llava.detail, llava.tone) == ("there", "wrong, malformed", "bad")
    assert picture.embedded is embedded
    html = render_html(Page("a", "b", [Part("c", [picture])]))
    assert ("data:image/png" in html) is embedded
    assert ('src="answers-things.png"' in html) is not embedded
