"""Check which workflow a row runs, what kind a position is, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from grafting import batch, grafted, logits_of, plain, row, rows, text_of
from mmgraft.errors import UsageError
from mmgraft.grafts.base import IMAGE, PADDING, TEXT, select
from mmgraft.model.cache import RowSlot
from mmgraft.model.rows import Rows, kinds_of, sort_rows

EMPTY = RowSlot(None, 0)
MASK = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])


def sort(
    wanted: Any = None,
    mask: Tensor | None = MASK,
    slot: RowSlot = EMPTY,
    continuing: Sequence[str] = (),
) -> list[str]:
    known = ["mm", "grounding"]
    return sort_rows((2, 4), mask, wanted, known, "mm", slot, continuing=continuing).names


class OfText(RowSlot):
    """A slot of a cache that the text workflow filled."""

    def __init__(self) -> None:
        super().__init__(None, 0)

    @property
    def past(self) -> int:
        return 6


class Filled(RowSlot):
    """A slot that remembers two rows."""

    def __init__(self, *numbers: int) -> None:
        super().__init__(None, 0)
        self.numbers = list(numbers)

    @property
    def filled(self) -> bool:
        return True

    def workflows(self) -> list[int]:
        return self.numbers


def test_rows_with_an_image_run_the_default_workflow_and_others_text() -> None:
    assert sort() == ["mm", "text"]
    assert sort(mask=None) == ["text", "text"]
    longer = torch.cat([torch.ones_like(MASK), MASK], dim=1)  # of a whole prompt: the end counts
    assert sort(mask=longer) == ["mm", "text"]


def test_an_image_position_that_is_padding_is_none() -> None:
    """A mask of images made by token id marks padding too where the pad token is the image's."""
    padding = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    found = [
        sort_rows((2, 4), MASK, None, ["mm"], "mm", EMPTY, real)
        for real in (
            padding,
            torch.cat([1 - padding, padding], dim=1),  # of what is cached, too: the end counts
            torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]]),
            torch.zeros(2, 1, 4, 4),  # a mask of its own says nothing about padding
        )
    ]
    assert [one.images for one in found] == [[1, 0], [1, 0], [0, 0], [2, 0]]
    assert [one.names[0] for one in found] == ["mm", "mm", "text", "mm"]
    kinds = kinds_of((2, 4), MASK, padding, torch.device("cpu"))
    assert kinds.tolist() == [[TEXT, IMAGE, PADDING, TEXT], [TEXT] * 4]
    later = kinds_of((2, 2), MASK, padding, torch.device("cpu"))
    assert later.tolist() == [[PADDING, TEXT], [TEXT] * 2]


def test_what_was_asked_for_is_run() -> None:
    assert sort("grounding") == ["grounding", "grounding"]
    assert sort(["grounding", "mm"]) == ["grounding", "mm"]
    assert sort(torch.tensor([1, -1])) == ["grounding", "text"]
    assert sort("text", mask=None) == ["text", "text"]


def test_a_cache_remembers_its_rows() -> None:
    slot = Filled(1, -1)
    assert sort(mask=None, slot=slot) == ["grounding", "text"]
    assert sort(["grounding", "text"], slot=slot) == ["grounding", "text"]
    with pytest.raises(UsageError, match="another workflow"):
        sort("mm", slot=slot)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"wanted": "ocr"}, "'ocr'.*text, mm, grounding"),
        ({"wanted": ["mm"]}, "1 workflows were given for 2 rows"),
        ({"wanted": "text"}, "row 0 has an image but runs the text workflow.*mm, grounding"),
        ({"wanted": ["text", "mm"]}, "row 0 has an image"),
        ({"slot": OfText()}, "run the whole dialogue again"),
        ({"wanted": "mm", "mask": None, "slot": OfText()}, "run the whole dialogue again"),
        ({"slot": Filled(-1, 0)}, "a row now needs 'mm'"),
        ({"slot": Filled(-1, 0), "continuing": ["grounding"]}, "a row now needs 'mm'"),
        ({"slot": Filled(0, 1), "wanted": ["text", "grounding"]}, "another workflow"),
    ],
)
def test_what_cannot_be_is_refused(call: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        sort(**call)


def test_a_cache_of_text_goes_on_with_the_workflows_that_can() -> None:
    for slot in (OfText(), Filled(-1, -1)):
        assert sort(slot=slot, continuing=["mm"]) == ["mm", "text"]
        assert sort(["grounding", "text"], slot=slot, continuing=["grounding"])[0] == "grounding"
    assert sort(slot=Filled(-1, 1), continuing=["mm"]) == ["mm", "grounding"]


def test_gates_are_left_out_where_all_rows_agree() -> None:
    device = torch.device("cpu")
    mixed = Rows(["mm", "text", "mm"])
    assert mixed.gate("mm", device).tolist() == [True, False, True]
    assert not mixed.text_only
    assert Rows(["mm", "mm"]).gate("mm", device) is None
    assert Rows(["text", "text"]).text_only
    chosen, other = torch.ones(3, 2, 2), torch.zeros(3, 2, 2, dtype=torch.float64)
    assert select(None, chosen, other) is chosen
    assert select(mixed.gate("mm", device), chosen, other)[:, 0, 0].tolist() == [1, 0, 1]


def test_kinds_of_positions() -> None:
    cpu = torch.device("cpu")
    padding = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    found = kinds_of((2, 4), MASK, padding, cpu)
    assert found.tolist() == [[TEXT, IMAGE, IMAGE, TEXT], [PADDING, PADDING, TEXT, TEXT]]
    later = kinds_of((2, 2), None, padding, cpu)  # the mask covers what is cached, too
    assert later.tolist() == [[TEXT, TEXT], [TEXT, TEXT]]
    assert kinds_of((2, 4), None, None, cpu).eq(TEXT).all()
    assert kinds_of((2, 4), MASK, torch.zeros(2, 1, 4, 4), cpu)[0].tolist() == [1, 2, 2, 1]
    assert PADDING == 0  # a cache slot that nothing was written to


def test_images_and_their_positions_must_agree() -> None:
    model, inputs = grafted("llama", "iaa-c"), batch(rows("ttiiiitt", "iiiitt"))
    missing = {k: v for k, v in inputs.items() if k != "image_features"}
    with pytest.raises(UsageError, match="8 image positions but no image"):
        logits_of(model, missing)
    one = {**inputs, "image_features": inputs["image_features"][:1]}
    with pytest.raises(
        UsageError, match=r"row 1 has 4 image positions, and its images \[\] take 0"
    ):
        logits_of(model, one)
    torn = {**inputs, "mm_token_type_ids": inputs["mm_token_type_ids"].clone()}
    torn["mm_token_type_ids"][0, 5] = 0
    torn["mm_token_type_ids"][1, 4] = 1
    with pytest.raises(
        UsageError, match=r"row 0 has 3 image positions, and its images \[0\] take 4"
    ):
        logits_of(model, torn)
    unplaced = {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}
    with pytest.raises(UsageError, match="pass mm_token_type_ids"):
        logits_of(model, unplaced)
    with pytest.raises(UsageError, match="without its vision tower"):
        logits_of(model, {**missing, "pixel_values": torch.zeros(2, 3, 8, 8)})
    with pytest.raises(UsageError, match="give input_ids or inputs_embeds"):
        model(attention_mask=inputs["attention_mask"])
    with pytest.raises(UsageError, match="no workflow is called 'ocr'"):
        model.workflow("ocr")


def test_a_mask_and_positions_are_not_needed_without_padding() -> None:
    for arch in ("llama", "gpt2", "bloom"):
        model, inputs = grafted(arch, "wings"), batch([row("ttiiiittt")])
        expected = logits_of(model, inputs)
        bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
        positions = torch.arange(9)[None]
        assert torch.allclose(logits_of(model, bare), expected, atol=1e-5)
        given = logits_of(model, {**inputs, "position_ids": positions})
        assert torch.allclose(given, expected, atol=1e-5)


def test_only_the_logits_asked_for_are_computed() -> None:
    model, inputs = grafted("llama", "iaa-c"), batch(rows("ttiiiitt", "tttttt"), "left")
    expected = logits_of(model, inputs)
    assert torch.allclose(logits_of(model, inputs, logits_to_keep=2), expected[:, -2:], atol=1e-5)
    texts = text_of(batch(rows("tttttt")))
    kept = logits_of(model, texts, logits_to_keep=1)
    assert torch.equal(kept, logits_of(plain("llama"), texts, logits_to_keep=1))
