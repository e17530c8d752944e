"""The sheet of boxes: the true and the predicted boxes, and images that stay in their run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from box_example import BOX, GPL, SIZE, make_boxes, state_licence
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.files import read_items
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.metrics.boxes import format_box
from mmgraft.evaluation.report.report import write_report
from mmgraft.evaluation.report.sheets import (
    CORRECT,
    IMAGE,
    MARGIN,
    MODELS,
    Answer,
    SheetItem,
    box_answer,
    draw_sheet,
    is_private,
    sampled_indices,
    write_box_sheet,
)
from mmgraft.hub.push import plan_push
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import SetResult
from report_example import a_set, example_run, score, section

BLUE = ImageColor.getrgb(MODELS[0])
HALF = (4.0, 3.0, 24.0, 10.5)  # the upper half of the true box
ANSWERS = (format_box(BOX, "unit", SIZE), f"at {format_box(HALF, 'unit', SIZE)}", "over there")


@pytest.fixture
def spec(tmp_path: Path) -> SetSpec:
    return make_boxes(tmp_path / "set")


def write(run: Path, spec: SetSpec) -> str | None:
    items = read_items(spec)
    return write_box_sheet(run, spec, Path(str(spec.path)), items, ANSWERS)


def test_an_answer_has_its_iou_or_is_malformed(spec: SetSpec) -> None:
    found = [box_answer("", spec, *one) for one in zip(read_items(spec), ANSWERS, strict=True)]
    assert [one.note for one in found] == ["IoU 1.00", "IoU 0.50", "malformed"]
    assert [one.correct for one in found] == [True, True, False]
    assert [one.line for one in found] == ["IoU 1.00", "IoU 0.50", "malformed: over there"]
    assert found[2].box is None
    assert box_answer("iaa", spec, read_items(spec)[2], "").line == "iaa: malformed: (nothing)"


def test_an_item_without_a_box_is_named(spec: SetSpec) -> None:
    with pytest.raises(UsageError, match="item x: no box"):
        box_answer("", spec, Item("x", [], "where?"), "[0,0,1,1]")


def test_the_true_line_is_unbroken_and_the_answered_one_dashed(tmp_path: Path) -> None:
    Image.new("RGB", (100, 100), (250, 220, 90)).save(tmp_path / "one.png")
    answer = Answer("", "[..]", True, (10, 50, 90, 95), "IoU 0.10")
    sheet = draw_sheet([SheetItem(tmp_path / "one.png", "?", "[..]", [answer], (10, 5, 90, 45))])
    left, top, scale = 2 * MARGIN, MARGIN, IMAGE // 100

    def upper_edge(y: int) -> set[object]:
        return {sheet.getpixel((left + x, top + y * scale)) for x in range(22, 178)}

    assert upper_edge(5) == {CORRECT}
    assert upper_edge(50) == {BLUE, (255, 255, 255)}


def test_both_lines_are_seen_where_the_boxes_are_the_same(tmp_path: Path) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "one.png")
    box = (10.0, 5.0, 90.0, 45.0)
    sheet = draw_sheet([SheetItem(tmp_path / "one.png", "?", "", [Answer("", "", True, box)], box)])
    row = {sheet.getpixel((2 * MARGIN + x, MARGIN + 10)) for x in range(22, 178)}
    assert row == {CORRECT, BLUE}


def test_a_malformed_answer_has_a_crossed_mark(tmp_path: Path) -> None:
    """The words left alike: only the mark differs."""
    Image.new("RGB", (100, 100)).save(tmp_path / "one.png")
    marks = []
    for box in (None, (0.0, 0.0, 9.0, 9.0)):
        answer = Answer("a", "same", False, box)
        sheet = draw_sheet([SheetItem(tmp_path / "one.png", "?", "", [answer], (0, 0, 50, 50))])
        below = sheet.crop((2 * MARGIN, IMAGE + 2 * MARGIN, 2 * MARGIN + 10, sheet.height))
        marks.append({color for _, color in below.getcolors(1 << 16) or ()})
    assert BLUE in marks[0] & marks[1]
    assert marks[0] - marks[1], "red strokes"


def test_items_are_sampled_whatever_was_answered() -> None:
    picture = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
    items = [Item(str(at), picture if at % 2 else [], "?") for at in range(50)]
    indices = sampled_indices(items)
    assert len(indices) == 12
    assert indices == sorted(indices)
    assert all(at % 2 for at in indices)
    assert indices == sampled_indices(items)
    assert sampled_indices(items[:1]) == []


@pytest.mark.parametrize(
    ("licence", "name"),
    [
        ("MIT", "results/boxes-things.png"),
        (GPL, "results/sheets/things.png"),
        (None, "results/sheets/things.png"),
    ],
)
def test_a_sheet_lies_where_its_licence_lets_it(
    tmp_path: Path, licence: str | None, name: str
) -> None:
    spec = make_boxes(tmp_path / "set", licence)
    assert write(tmp_path / "run", spec) == name
    assert is_private(name) is (licence != "MIT")
    with Image.open(tmp_path / "run" / name) as sheet:
        assert sheet.format == "PNG"


def test_a_sheet_that_may_no_longer_go_along_is_taken_back(tmp_path: Path) -> None:
    spec = make_boxes(tmp_path / "set", "MIT")
    write(tmp_path / "run", spec)
    state_licence(tmp_path / "set", GPL)
    write(tmp_path / "run", spec)
    assert not (tmp_path / "run" / "results" / "boxes-things.png").exists()


def reported(tmp_path: Path, licence: str | None) -> tuple[Path, bytes]:
    """A run with a report of a set of boxes, and the bytes of its sheet."""
    spec = make_boxes(tmp_path / "set", licence)
    name = write(tmp_path / "run-results", spec)
    assert name is not None
    one = a_set(
        "things", "box", "precision_at_0.5", scores={"precision_at_0.5": score(0.5)}, sheet=name
    )
    run = example_run(tmp_path / "run", section("vision", [one]))
    shutil.copytree(tmp_path / "run-results" / "results", run / "results", dirs_exist_ok=True)
    write_report(run)
    return run, (run / name).read_bytes()


@pytest.mark.parametrize("licence", [GPL, None])
def test_images_that_are_not_free_are_linked_and_never_pushed(
    tmp_path: Path, licence: str | None
) -> None:
    run, png = reported(tmp_path, licence)
    html = (run / "results" / "report.html").read_text()
    assert '<img src="sheets/things.png"' in html
    assert "](sheets/things.png)" in (run / "results" / "report.md").read_text()
    assert html.count("data:image/png") == 1, "the training curve alone"
    files = plan_push(run).files
    assert "results/report.html" in {file.name for file in files}
    assert not [file.name for file in files if "things" in file.name or "sheet" in file.name]
    for file in files:
        assert png != (
            file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        )


def test_free_images_are_in_the_page_and_go_along(tmp_path: Path) -> None:
    run, _ = reported(tmp_path, "MIT")
    html = (run / "results" / "report.html").read_text()
    assert html.count("data:image/png") == 2
    assert "sheets/" not in html
    assert "results/boxes-things.png" in {file.name for file in plan_push(run).files}


@pytest.mark.parametrize("sheet", ["/etc/passwd", "results/sheets/../../../x.png", "x.png"])
def test_a_result_names_no_image_outside_of_the_results(sheet: str) -> None:
    with pytest.raises(ValueError, match="sheet"):
        SetResult.model_validate(
            a_set("x", "box", "mean_iou", scores={}).model_dump() | {"sheet": sheet}
        )


def test_a_run_without_its_sheet_still_has_a_report(tmp_path: Path) -> None:
    run, _ = reported(tmp_path, GPL)
    shutil.rmtree(run / "results" / "sheets")
    write_report(run)
    assert "sheets/" not in (run / "results" / "report.html").read_text()
