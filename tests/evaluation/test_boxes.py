from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgraft.errors import UsageError
from mmgraft.evaluation.metrics.boxes import (
    format_box,
    format_boxes,
    iou,
    measure_boxes,
    parse_box,
    parse_boxes,
)

SIZE = (200, 100)
FORMATS = ("unit", "thousand", "ten", "pixel", "cogvlm", "qwen")


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        ("unit", "[0.10,0.20,0.50,1.00]"),
        ("thousand", "[100,200,500,999]"),
        ("ten", "[1,2,4,9]"),
        ("pixel", "[20,20,100,100]"),
        ("cogvlm", "[[100,200,500,999]]"),
        ("qwen", "<box>(100,200),(500,999)</box>"),
    ],
)
def test_a_box_is_written_in_each_format(boxes, text: str) -> None:
    assert format_box((20, 20, 100, 100), boxes, SIZE) == text


@pytest.mark.parametrize(
    ("boxes", "text", "box"),
    [
        ("unit", "[0.1, 0.2, 0.5, 1]", (20, 20, 100, 100)),
        ("unit", "It is at [.1,0.2,0.5,1.0].", (20, 20, 100, 100)),
        ("unit", "[[0.1,0.2,0.5,1.0]]", (20, 20, 100, 100)),
        ("unit", "[0.1,0.2,0.5,1.0] or [0,0,1,1]", (20, 20, 100, 100)),
        ("unit", "[0.1,0.2] [0.1,0.2,0.5,1.0]", (20, 20, 100, 100)),
        ("thousand", "[0, 0, 999, 999]", (0, 0, 200, 100)),
        ("ten", "[0,3,9,9]", (0, 100 / 3, 200, 100)),
        ("thousand", "[333,333,666,666]", (200 / 3, 100 / 3, 400 / 3, 200 / 3)),
        ("pixel", "[20.5,20,100,100]", (20.5, 20, 100, 100)),
        ("cogvlm", "the cup [[000,333,999,999]]", (0, 100 / 3, 200, 100)),
        ("cogvlm", "[[0, 333, 999, 999; 1,2,3,4]]", (0, 100 / 3, 200, 100)),
        ("cogvlm", "[1,2,3,4] or [[0,333,999,999]]", (0, 100 / 3, 200, 100)),
        ("qwen", "<ref>the cup</ref><box>(0,333),(999,999)</box>", (0, 100 / 3, 200, 100)),
        ("qwen", "<ref>a (red) cup</ref><box>( 0, 333 ), (999,999)</box>", (0, 100 / 3, 200, 100)),
        ("qwen", " the cup(0,333),(999,999)", (0, 100 / 3, 200, 100)),  # special tokens dropped
        ("pixel", "[-5,-5,300,50]", (0, 0, 200, 50)),  # cut to the picture
    ],
)
def test_a_box_is_read_in_each_format(boxes, text: str, box) -> None:
    assert parse_box(text, boxes, SIZE) == pytest.approx(box)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "left of the dog",
        "[0.1,0.2,0.5]",
        "[0.1,0.2,0.5,0.6,0.7]",
        "0.1,0.2,0.5,0.6",
        "[0.1,0.2,0.5,0.6",
        "[a,b,c,d]",
        "[nan,0,1,1]",
        "[0.5,0.2,0.1,0.6]",  # swapped corners
        "[0.1,0.2,0.1,0.6]",  # no width
        "[10,20,100,90]",  # pixels, where shares were asked for
    ],
)
def test_a_malformed_box_is_none(text: str) -> None:
    assert parse_box(text, "unit", SIZE) is None


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        ("cogvlm", "[100,200,500,999]"),
        ("cogvlm", "[[100,200,500]]"),
        ("cogvlm", "[[100,200,500,999"),
        ("cogvlm", "[[500,200,100,999]]"),
        ("qwen", "[100,200,500,999]"),
        ("qwen", "<box>(100,200)</box>"),
        ("qwen", "<box>(100,200),(500,)</box>"),
        ("qwen", "<box>(500,200),(100,999)</box>"),
    ],
)
def test_another_form_is_malformed(boxes, text: str) -> None:
    assert parse_box(text, boxes, SIZE) is None


@pytest.mark.parametrize(
    ("boxes", "phrase", "text"),
    [
        ("cogvlm", "two cups", "two cups [[000,000,100,500;500,200,999,999]]"),
        ("cogvlm", "", "[[000,000,100,500;500,200,999,999]]"),
        ("qwen", "two cups", "<ref>two cups</ref><box>(0,0),(100,500)</box>"
         "<box>(500,200),(999,999)</box>"),
        ("thousand", "", "[0,0,100,500] [500,200,999,999]"),
        ("unit", "cups", "cups [0.00,0.00,0.10,0.50] [0.50,0.20,1.00,1.00]"),
    ],
)  # fmt: skip
def test_several_boxes_are_written_with_their_phrase_and_read(boxes, phrase, text: str) -> None:
    found = [(0.0, 0.0, 20.0, 50.0), (100.0, 20.0, 200.0, 100.0)]
    assert format_boxes(found, boxes, SIZE, phrase) == text
    back = parse_boxes(text, boxes, SIZE)
    assert len(back) == 2
    for box, wanted in zip(back, found, strict=True):
        assert box == pytest.approx(wanted, abs=0.3)
    swapped = parse_boxes(text.replace("0.50,0.20", "1.00,1.00").replace("500,200", "999,999"),
                          boxes, SIZE)  # fmt: skip
    assert swapped[0] is not None
    assert swapped[1] is None


def test_a_small_box_is_widened_not_lost() -> None:
    text = format_box((20.1, 20.1, 20.4, 20.4), "pixel", SIZE)
    assert text == "[20,20,21,21]"


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (9, 5, 5, 9), (200, 5, 220, 9), (-9, 1, 0, 2)])
def test_a_box_without_an_area_in_the_picture_is_not_written(box) -> None:
    with pytest.raises(UsageError, match="no area in an image of 200 x 100"):
        format_box(box, "unit", SIZE)


@st.composite
def placed(draw) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    size = (draw(st.integers(20, 2000)), draw(st.integers(20, 2000)))
    corners = []
    for side in size:
        low = draw(st.floats(0, side * 0.999))
        corners.append((low, draw(st.floats(low + side * 0.0005, side))))
    (x1, x2), (y1, y2) = corners
    return (x1, y1, x2, y2), size


@given(placed(), st.sampled_from(FORMATS))
def test_what_is_written_is_read_to_half_a_step_or_one(case, boxes) -> None:
    box, size = case
    back = parse_box(format_box(box, boxes, size), boxes, size)
    assert back is not None
    for at, (mine, read) in enumerate(zip(box, back, strict=True)):
        step = size[at % 2] / {"unit": 100, "ten": 9, "pixel": size[at % 2]}.get(boxes, 999)
        wide = box[at % 2 + 2] - box[at % 2] > step
        assert abs(mine - read) <= step * (0.5 if wide else 1) + 1e-6


@pytest.mark.parametrize(
    ("other", "overlap"),
    [
        ((0, 0, 10, 10), 1.0),
        ((5, 0, 15, 10), 50 / 150),
        ((0, 0, 10, 5), 0.5),
        ((2, 2, 4, 4), 0.04),
        ((10, 0, 20, 10), 0.0),  # touching
        ((20, 20, 30, 30), 0.0),  # apart on both axes: two negatives are no overlap
    ],
)
def test_iou_of_hand_worked_boxes(other, overlap: float) -> None:
    assert iou((0, 0, 10, 10), other) == pytest.approx(overlap)
    assert iou(other, (0, 0, 10, 10)) == pytest.approx(overlap)


def test_precision_counts_half_as_right_and_malformed_as_wrong() -> None:
    truth = [(0.0, 0.0, 100.0, 100.0)] * 4
    given = ["[0,0,100,50]", "[0,0,100,49]", "nowhere", "[0,0,100,100]"]
    found = measure_boxes(given, truth, [SIZE] * 4, "pixel")
    assert found.main == "precision_at_0.5"
    assert found.values() == pytest.approx(
        {"precision_at_0.5": 0.5, "mean_iou": (0.5 + 0.49 + 0 + 1) / 4, "malformed": 0.25}
    )


@pytest.mark.parametrize("boxes", FORMATS)
def test_an_always_right_model_scores_all(boxes) -> None:
    truth = [(x, 10.0, x + 40.0, 90.0) for x in range(20, 100, 20)]
    given = [format_box(box, boxes, SIZE) for box in truth]
    found = measure_boxes(given, truth, [SIZE] * 4, boxes).values()
    assert found["precision_at_0.5"] == 1.0
    assert found["mean_iou"] > (0.6 if boxes == "ten" else 0.98), "a ninth of the picture is coarse"
    assert found["malformed"] == 0.0
