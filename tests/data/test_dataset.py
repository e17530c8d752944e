from __future__ import annotations

import base64
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mmgraft.data.batches.collate import Collator
from mmgraft.data.batches.dataset import RowDataset, cut
from mmgraft.data.chat.labels import supervise_row
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.images import open_image
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.vision.feature_cache import FeatureCache
from text_tokenizers import template, text_tokenizer

PATCHES = 4


def _preprocess(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.full((3, 2, 2), float(image.width)) for image in images])


@pytest.fixture
def processor() -> GraftProcessor:
    tokenizer = text_tokenizer("byte_bpe", template("smollm2"))
    return GraftProcessor(tokenizer, PATCHES, 4, preprocess=_preprocess)


@pytest.fixture
def row(tmp_path: Path) -> Callable[..., Row]:
    def make(name: str, widths: tuple[int, ...] = (), answer: str = "A cat.") -> Row:
        parts: list[dict[str, Any]] = []
        for width in widths:
            path = tmp_path / f"{width}.png"
            Image.new("RGB", (width, 3)).save(path)
            parts += [{"type": "image", "image": str(path)}, {"type": "text", "text": "What?"}]
        messages = [
            {"role": "user", "content": parts or "What?"},
            {"role": "assistant", "content": answer},
        ]
        return Row(name, messages, "data.json", f"row {name}")

    return make


def test_rows_are_tokenised_and_opened_when_asked_for(
    processor: GraftProcessor, row: Callable[..., Row]
) -> None:
    dataset = RowDataset([row("1", (5, 6))], processor)
    assert len(dataset) == 1
    example = dataset[0]
    assert [image.width for image in example.images] == [5, 6]
    assert len(example) == len(example.encoded.input_ids)
    assert example.encoded == supervise_row(processor, dataset.rows[0])
    unopened = RowDataset(dataset.rows, processor, load_images=False)[0]
    assert all(isinstance(image, str) for image in unopened.images)


def test_rows_without_an_image_are_skipped_and_counted(
    processor: GraftProcessor, row: Callable[..., Row], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row("1"), row("2", (5,)), row("3")]
    with caplog.at_level(logging.DEBUG, "mmgraft"):
        dataset = RowDataset(rows, processor)
    assert [r.id for r in dataset.rows] == ["2"]
    assert dataset.dropped_text_rows == 2
    assert "2 of 3 rows have no image" in caplog.text
    for policy in ("graft", "base"):
        assert len(RowDataset(rows, processor, text_rows=policy)) == 3
    with pytest.raises(UsageError, match="text_rows: graft"):
        RowDataset(rows[:1], processor)
    with pytest.raises(UsageError, match="no rows to train on"):
        RowDataset([], processor)


def test_a_cut_keeps_images_whole(processor: GraftProcessor, row: Callable[..., Row]) -> None:
    one = row("1", (5, 6))
    messages = [*one.messages, *row("2", (7,), "A second, longer answer.").messages]
    whole = supervise_row(processor, Row("1", messages))
    starts = [at for at, kind in enumerate(whole.kinds) if kind][::PATCHES]
    third = starts[2]
    for length in range(third, third + PATCHES):
        short = cut(whole, length, "row 1")
        assert len(short) == third
        assert len(short.images) == 2
        assert sum(short.kinds) == 2 * PATCHES
        assert short.spans == whole.spans[:1]
    assert len(cut(whole, third + PATCHES, "row 1").images) == 3
    end = whole.spans[1][1]
    partly = cut(whole, end - 2, "row 1")
    assert len(partly) == end - 2
    assert partly.spans[1] == (whole.spans[1][0], end - 2)
    assert [x for x in partly.labels if x != -100] == [x for x in whole.labels if x != -100][:-2]


def test_a_rows_only_image_is_whole_or_left_out(
    processor: GraftProcessor, row: Callable[..., Row]
) -> None:
    """It comes after an answer, so that something to learn is left without it."""
    messages = [*row("1").messages, *row("2", (7,), "A second, longer answer.").messages]
    whole = supervise_row(processor, Row("1", messages))
    first = whole.kinds.index(1)
    for length in range(first, first + PATCHES):
        short = cut(whole, length, "row 1")
        assert (len(short), len(short.images), sum(short.kinds)) == (first, 0, 0)
        assert short.spans == whole.spans[:1]
    shown = cut(whole, first + PATCHES, "row 1")
    assert (len(shown), len(shown.images), sum(shown.kinds)) == (first + PATCHES, 1, PATCHES)
    dataset = RowDataset([Row("1", messages)], processor, max_length=first + 2)
    assert not dataset[0].images
    assert dataset.counts == {"cut": 1, "skipped": 0}


def test_a_cut_that_leaves_nothing_to_learn_is_refused(
    processor: GraftProcessor, row: Callable[..., Row]
) -> None:
    dataset = RowDataset([row("1", (5, 6))], processor, max_length=12)
    with pytest.raises(UsageError, match=r"row 1 \(id 1\): .* the first 12 hold nothing"):
        dataset[0]


def test_cut_and_skipped_rows_are_counted_once_over_all_workers(
    processor: GraftProcessor, row: Callable[..., Row], caplog: pytest.LogCaptureFixture
) -> None:
    long = row("long", (5,), "A cat. " * 30)
    bad = Row("bad", [{"role": "user", "content": [{"type": "image", "image": "none.png"}]},
                      {"role": "assistant", "content": "Yes"}])  # fmt: skip
    rows = [long, bad, row("good", (6,))]
    dataset = RowDataset(rows, processor, max_length=100, on_bad_row="skip")
    loader = DataLoader(dataset, batch_size=3, num_workers=1, collate_fn=list)
    for time in range(2):
        (batch,) = list(loader)
        skipped = [row.id for example in batch for row in example.skipped]
        assert skipped == (["bad"] if time == 0 else [])  # told once, not once a worker or epoch
        assert [example.row_id for example in batch] == ["long", "good", "good"]
        assert len(batch[0]) == 100
    assert dataset.counts == {"cut": 1, "skipped": 1}
    strict = RowDataset(rows, processor)
    with pytest.raises(UsageError, match=r"row bad: .*none\.png"):
        strict[1]
    with pytest.raises(UsageError, match="not one of 1 rows can be used; the last one: row bad"):
        RowDataset([bad], processor, on_bad_row="skip")[0]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_what_stands_in_a_bad_rows_place_does_not_depend_on_what_was_met_before(
    processor: GraftProcessor, row: Callable[..., Row], order: list[int]
) -> None:
    bad = Row("bad", [{"role": "user", "content": "What?"}], "data.json", "row bad")
    rows = [row("0"), bad, row("known"), row("3")]
    known = {(str(Path.cwd() / "data.json"), "row known")}
    dataset = RowDataset(rows, processor, text_rows="base", on_bad_row="skip", known_bad=known)
    found = {at: dataset[at].row_id for at in order}
    assert found == {0: "0", 1: "3", 2: "3", 3: "3"}


def test_the_longest_rows_are_among_those_that_are_checked(
    processor: GraftProcessor, row: Callable[..., Row]
) -> None:
    rows = [row(str(number), answer="A cat. " * (60 if number == 7 else 1)) for number in range(30)]
    bad = Row("long", [{"role": "user", "content": "What? " * 60}, *row("31").messages[1:]])
    dataset = RowDataset([*rows, bad], processor, max_length=100, text_rows="base")
    with pytest.raises(UsageError, match=r"row long: .* nothing to learn"):
        dataset.check(4)
    RowDataset(rows, processor, max_length=100, text_rows="base").check(4)  # is cut, and is fine


def test_a_batch_has_all_that_the_model_takes(
    processor: GraftProcessor, row: Callable[..., Row]
) -> None:
    rows = [row("1", (5,)), row("2"), row("3", (6, 7), "A much longer answer.")]
    dataset = RowDataset(rows, processor, text_rows="base")
    batch = Collator(processor, "base")([dataset[i] for i in range(3)])
    encoded = [supervise_row(processor, r) for r in rows]
    length = max(map(len, encoded))
    padding = processor.tokenizer.pad_token_id
    for at, one in enumerate(encoded):
        pad = length - len(one)
        assert batch["input_ids"][at].tolist() == one.input_ids + [padding] * pad
        assert batch["attention_mask"][at].tolist() == [1] * len(one) + [0] * pad
        assert batch["mm_token_type_ids"][at].tolist() == one.kinds + [0] * pad
        assert batch["labels"][at].tolist() == one.labels + [-100] * pad
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5, 6, 7]
    assert batch["row_ids"] == ["1", "2", "3"]
    assert "workflow" not in batch


def test_text_rows_graft_names_the_workflow_of_every_row(
    processor: GraftProcessor, row: Callable[..., Row]
) -> None:
    dataset = RowDataset([row("1"), row("2")], processor, text_rows="graft")
    batch = Collator(processor, "graft", workflow="grounding", multiple=8)([dataset[0], dataset[1]])
    assert batch["workflow"] == ["grounding", "grounding"]
    assert "pixel_values" not in batch
    assert {batch[key].shape[1] % 8 for key in ("input_ids", "labels", "attention_mask")} == {0}


def test_a_feature_cache_is_asked_instead_of_making_pixels(
    processor: GraftProcessor, row: Callable[..., Row], tmp_path: Path
) -> None:
    def compute(paths: list[Path]) -> torch.Tensor:
        return torch.stack([torch.full((PATCHES, 2), float(path.stem)) for path in paths])

    cache = FeatureCache(tmp_path / "cache", "abc")
    dataset = RowDataset([row("1", (5, 6)), row("2", (5,))], processor, load_images=False)
    examples = [dataset[0], dataset[1]]
    with pytest.raises(UsageError, match="does not hold"):
        Collator(processor, features=cache)(examples)
    batch = Collator(processor, features=cache, compute=compute)(examples)
    assert batch["image_features"].shape == (3 * PATCHES, 2)
    assert batch["image_features"][::PATCHES, 0].tolist() == [5, 6, 5]
    assert "pixel_values" not in batch
    opened = RowDataset(dataset.rows, processor)
    with pytest.raises(UsageError, match=r"row 1 \(id 1\): the row holds its image in itself"):
        Collator(processor, features=cache)([opened[0]])


def test_a_processor_without_preprocessing_says_so(row: Callable[..., Row]) -> None:
    bare = GraftProcessor(text_tokenizer("byte_bpe", template("smollm2")), PATCHES, 4)
    dataset = RowDataset([row("1", (5,))], bare)
    with pytest.raises(UsageError, match="no image preprocessing"):
        Collator(bare)([dataset[0]])


def test_a_dataset_travels_to_a_worker(processor: GraftProcessor, row: Callable[..., Row]) -> None:
    dataset = RowDataset([row("1", (5,))], processor)
    before = dataset[0].encoded
    assert pickle.loads(pickle.dumps(processor)).encode(dataset.rows[0].messages).kinds
    assert dataset[0].encoded == before


def test_images_open_from_data_uris_and_say_what_is_wrong(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (5, 3), (0, 0, 0, 0)).save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    image = open_image(uri, "row 1")
    assert image.size == (5, 3)
    assert image.getpixel((0, 0)) == (255, 255, 255)  # transparent is white, as for files
    assert open_image(Image.new("L", (1, 1)), "row 1").mode == "RGB"
    path = tmp_path / "a.png"
    path.write_bytes(buffer.getvalue())
    assert open_image(path.as_uri(), "row 1").size == (5, 3)
    path.write_bytes(b"no image")
    for wrong, says in [
        (str(path), "row 1: .*a.png"),
        (str(tmp_path / "none.png"), "row 1: .*none.png"),
        ("data:image/png;base64,AAAA", "row 1: .* a data URI .* cannot identify"),
        ("data:image/png,AAAA", "row 1: a data URI .*base64"),
        ("http://x.org/a.png", "row 1: .*download it first"),
        (3, "row 1: an image of type int"),
    ]:
        with pytest.raises(UsageError, match=says):
            open_image(wrong, "row 1")
