from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from mmgraft.data.batches.dataset import RowDataset, longest_first
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.training.memory.estimate import TOKENISED, assumed, measured
from mmgraft.vision.plan import ImagePositions
from mmgraft.vision.projectors.configs import MlpConfig
from sized_tower import plan
from tiny_tokenizer import tiny_tokenizer


def row(words: int, images: int = 1, path: Any = "a.png") -> Row:
    question = [{"type": "image", "image": str(path)}] * images + [
        {"type": "text", "text": "what?"}
    ]
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "blue " * words},
    ]
    return Row(str(words), turns)


@pytest.fixture(scope="module")
def processor() -> GraftProcessor:
    return GraftProcessor(tiny_tokenizer(), 9, 5)


def test_the_longest_row_counts_wherever_it_is(processor):
    rows = [row(2) for _ in range(2 * TOKENISED)]
    rows[100] = row(50)
    sizes = measured(rows, processor, None, "skip")
    alone = measured([row(50)], processor, None, "skip")
    assert (sizes.length, sizes.supervised) == (alone.length, alone.supervised)
    assert sizes.uneven
    assert not alone.uneven
    assert sizes.source == f"longest of {2 * TOKENISED} rows"


@pytest.mark.parametrize("large", [3, 70, 99])
def test_images_count_by_their_size_where_it_decides(tmp_path, large):
    """One large image with a short text, among many rows with more text and small images."""
    for name, side in (("small", 8), ("large", 48)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    rows = [row(1 if n == large else 6, path=tmp_path / "small.png") for n in range(100)]
    rows[large] = row(1, path=tmp_path / "large.png")
    processor = GraftProcessor(tiny_tokenizer(), ImagePositions(MlpConfig().counts, plan), 5)
    alone = measured([rows[large]], processor, None, "skip")
    sizes = measured(rows, processor, None, "skip")
    assert (sizes.length, sizes.sizes) == (alone.length, ((48, 48),))
    assert large in set(RowDataset(rows, processor)._sample(4))
    rows[2] = row(1, path=tmp_path / "missing.png")  # is named where it is used
    assert large == longest_first(rows, processor)[0]


def test_images_count_with_all_their_positions(processor):
    one, two = (measured([row(3, images=n)], processor, None, "skip") for n in (1, 2))
    assert (one.images, two.images) == (1, 2)
    assert two.length - one.length == 9


def test_a_row_is_cut_as_training_cuts_it(processor):
    assert measured([row(50)], processor, 60, "skip").length == 60


def test_text_rows_count_where_they_are_trained(processor):
    rows = [row(3), row(60, images=0)]
    short, long = (measured(rows, processor, None, kind) for kind in ("skip", "graft"))
    assert short.length < long.length


def test_a_packed_sequence_is_full_of_the_rows_with_most_images_for_their_length(processor):
    rows = [row(50), row(3), row(3, images=0)]
    sizes = measured(rows, processor, 200, "graft", packing=True)
    short, long = (measured([one], processor, 200, "graft") for one in (rows[1], rows[0]))
    assert sizes.length == 200
    assert sizes.images == 200 // short.length > 1
    assert sizes.supervised == long.supervised  # it is cut to a whole sequence
    assert sizes.source == "packed, from 3 rows"


def test_rows_that_cannot_be_used_are_left_out_where_training_leaves_them_out(processor):
    empty = Row("x", [{"role": "user", "content": [{"type": "image", "image": "a.png"}] * 5}])
    rows = [empty, row(3), row(2)]
    with pytest.raises(UsageError, match="nothing to learn"):
        measured(rows, processor, None, "skip")
    left = measured(rows, processor, None, "skip", skip_bad=True)
    assert left.length == measured([row(3)], processor, None, "skip").length
    with pytest.raises(UsageError, match="nothing to learn"):
        measured([empty, empty], processor, None, "skip", skip_bad=True)


def test_an_assumed_packed_sequence_has_as_many_images_as_it_has_room_for():
    assert assumed(100, 9, "max_length", packing=True).images == 9  # of 9 + 2 positions each
    assert assumed(12, 9, "max_length", packing=True).images == 1


def test_an_assumed_row_has_one_image_and_learns_the_rest():
    sizes = assumed(100, 9, "--length")
    assert (sizes.length, sizes.images, sizes.supervised) == (100, 1, 90)
    with pytest.raises(UsageError, match=r"give --length 73"):
        assumed(10, 9, "--length")
