from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmgraft.data.batches.collate import Collator, Pack, PackCollator, Packs, examples_of, fill
from mmgraft.data.batches.dataset import Example, RowDataset
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from text_tokenizers import template, text_tokenizer

PATCHES = 4


@given(st.lists(st.integers(1, 12), max_size=40))
@settings(max_examples=60, deadline=None)
def test_bins_hold_what_fits_and_are_few(sizes: list[int]) -> None:
    sizes = sorted(sizes, reverse=True)
    bins = fill(sizes, 12)
    sums: dict[int, int] = {}
    for size, one in zip(sizes, bins, strict=True):
        sums[one] = sums.get(one, 0) + size
    assert all(total <= 12 for total in sums.values())
    assert sorted(sums) == list(range(len(sums)))
    assert bins == best_fit(sizes, 12)
    assert len(sums) <= 11 / 9 * -(-sum(sizes) // 12) + 2  # far above best fit's own bound


def best_fit(sizes: list[int], capacity: int) -> list[int]:
    """The plain way: of the bins that take it, the one with the least room, the newest of those."""
    room: list[int] = []
    since: list[int] = []
    found = []
    for step, size in enumerate(sizes):
        fitting = [at for at, left in enumerate(room) if left >= size]
        if fitting:
            least = min(room[at] for at in fitting)
            at = max((at for at in fitting if room[at] == least), key=lambda at: since[at])
        else:
            at = len(room)
            room.append(capacity)
            since.append(step)
        room[at] -= size
        since[at] = step
        found.append(at)
    return found


@pytest.fixture
def processor() -> GraftProcessor:
    tokenizer = text_tokenizer("byte_bpe", template("smollm2"))
    preprocess = lambda images: torch.stack(  # noqa: E731
        [torch.full((3, 2, 2), float(image.width)) for image in images]
    )
    return GraftProcessor(tokenizer, PATCHES, 4, preprocess=preprocess)


def row(folder: Path, name: str, width: int = 0, answer: str = "A cat.") -> Row:
    content: Any = "What?"
    if width:
        path = folder / f"{width}.png"
        Image.new("RGB", (width, 3)).save(path)
        content = [{"type": "image", "image": str(path)}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Row(name, turns, "data.json", f"row {name}")


@pytest.fixture
def dataset(processor: GraftProcessor, tmp_path: Path) -> RowDataset:
    made = [
        row(tmp_path, "0", 5),
        row(tmp_path, "1", answer="Yes, it is."),
        row(tmp_path, "2", 7, "No."),
        row(tmp_path, "3", 9),
    ]
    return RowDataset(made, processor, text_rows="graft", on_bad_row="skip")


def test_a_sequence_holds_the_rows_of_its_pack(
    dataset: RowDataset, processor: GraftProcessor
) -> None:
    packs = Packs(dataset, 2)
    assert len(packs) == 2
    items = [packs[(2, 1)], packs[(3,)]]
    collator = Collator(processor, "graft")
    batch = PackCollator(collator)(items)
    alone = [dataset[at].encoded for at in (2, 1, 3)]
    sizes = [len(one) for one in alone]
    assert batch["segments"].tolist() == [
        [1] * sizes[0] + [2] * sizes[1],
        [1] * sizes[2] + [0] * (sizes[0] + sizes[1] - sizes[2]),
    ]
    for name, values in (
        ("input_ids", [one.input_ids for one in alone]),
        ("mm_token_type_ids", [one.kinds for one in alone]),
        ("labels", [[-100, *one.labels[1:]] for one in alone]),
    ):
        assert batch[name][0].tolist() == [*values[0], *values[1]], name
        assert batch[name][1, : sizes[2]].tolist() == list(values[2]), name
    assert batch["input_ids"][1, sizes[2] :].eq(processor.pad_id).all()
    assert batch["labels"][1, sizes[2] :].eq(-100).all()
    assert torch.equal(batch["attention_mask"], (batch["segments"] > 0).long())
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [7.0, 9.0]
    assert batch["row_ids"] == ["2", "1", "3"]
    assert batch["workflow"] == ["mm", "mm"]
    assert [one.row_id for one in examples_of(items)] == ["2", "1", "3"]


def test_no_row_of_a_pack_is_to_say_how_the_next_begins(
    dataset: RowDataset, processor: GraftProcessor
) -> None:
    """Here every token of every row is learned, the first as well."""

    def learned(at: int) -> Example:
        example = dataset[at]
        text = [at for at, kind in enumerate(example.encoded.kinds) if not kind]
        spans = tuple((at, at + 1) for at in text)
        return replace(example, encoded=replace(example.encoded, spans=spans))

    rows = [learned(at) for at in (1, 0, 2)]
    assert rows[1].encoded.labels[0] != -100
    batch = PackCollator(Collator(processor, "graft"))([Pack(rows[:2]), Pack(rows[2:])])
    wanted = [[-100, *one.encoded.labels[1:]] for one in rows]
    assert batch["labels"][0].tolist() == [*wanted[0], *wanted[1]]
    assert batch["labels"][1, : len(rows[2])].tolist() == wanted[2]


def test_images_of_a_pack_belong_to_its_sequence(
    dataset: RowDataset, processor: GraftProcessor
) -> None:
    """The second image stands in the first sequence, though its row is the third."""
    items = [Pack([dataset[at] for at in (0, 1, 2)]), Pack([dataset[3]])]
    plain = Collator(processor, "graft")(examples_of(items))
    plain["image_rows"] = torch.tensor([0, 2, 3])

    class Given:
        def __call__(self, examples: Any) -> dict[str, Any]:
            return dict(plain)

    given: Any = Given()
    given.processor = processor
    assert PackCollator(given)(items)["image_rows"].tolist() == [0, 0, 1]


def test_rows_by_themselves_are_collated_as_ever(
    dataset: RowDataset, processor: GraftProcessor
) -> None:
    items: list[Pack | Example] = [dataset[0], dataset[1]]
    batch = PackCollator(Collator(processor))(items)
    assert "segments" not in batch
    assert batch["input_ids"].shape[0] == 2


def test_a_bad_row_is_left_out_of_its_pack(dataset: RowDataset, tmp_path: Path) -> None:
    """A longer one in its place might not fit."""
    (tmp_path / "5.png").unlink()
    taken = dataset.together((0, 1))
    assert [one.row_id for one in taken] == ["1"]
    assert [bad.id for bad in taken[0].skipped] == ["0"]
    taken = dataset.together((3, 0))  # known by now
    assert [(one.row_id, one.skipped) for one in taken] == [("3", ())]
    (tmp_path / "7.png").unlink()
    taken = dataset.together((2, 0))  # none is left: the next good one
    assert [one.row_id for one in taken] == ["3"]
    assert [bad.id for bad in taken[0].skipped] == ["2"]
    dataset.on_bad_row = "error"
    dataset._flags.zero_()
    with pytest.raises(UsageError, match="row 0"):
        dataset.together((0, 1))


def test_the_length_of_a_row_or_why_it_has_none(
    dataset: RowDataset, processor: GraftProcessor, tmp_path: Path
) -> None:
    wanted = len(dataset[0])
    (tmp_path / "5.png").unlink()
    assert dataset.length(0) == wanted  # no picture is opened
    short = RowDataset(dataset.rows, processor, 8, "graft", on_bad_row="skip")
    bad = short.length(0)  # no answer within 8 positions
    assert not isinstance(bad, int)
    assert bad.id == "0"
    short.on_bad_row = "error"
    with pytest.raises(UsageError, match="nothing to learn"):
        short.length(0)
