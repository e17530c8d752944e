"""Rows whose images take different numbers of positions, with a tower that plans from the size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from grafting import CONFIGS, perturb
from mmgraft import GraftedModel
from mmgraft.data.batches.collate import Collator, Pack, PackCollator
from mmgraft.data.batches.dataset import RowDataset, cut
from mmgraft.data.chat.labels import supervise
from mmgraft.data.chat.preview import preview_row
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.evaluation.generate import answers as answering
from mmgraft.inference import Answerer, Dialogue
from mmgraft.vision.projectors.configs import (
    MlpConfig,
    PerceiverConfig,
    PixelShuffleConfig,
    PoolConfig,
    QFormerConfig,
)
from mmgraft.vision.towers.registry import TowerShape
from sized_tower import plan, sized_tower
from tiny import tiny_model
from tiny_tokenizer import tiny_tokenizer
from tiny_towers import picture, tiny_tower

SIZES = [(40, 24), (8, 8), (17, 30), (64, 9)]
PROJECTORS = [
    MlpConfig(),
    PixelShuffleConfig(),
    PerceiverConfig(latents=3, layers=2, heads=2, head_dim=4, per="view"),
    PerceiverConfig(form="idefics2", latents=2, layers=1, heads=2, kv_heads=1, per="image"),
    QFormerConfig(queries=2, width=8, layers=2, heads=2, hidden=8),
]
ANSWER = {"role": "assistant", "content": "yes"}


def chat(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    parts: list[Any] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def made(method: str = "iaa-c", projector: Any = None, tower: Any = None) -> Answerer:
    projector = projector or MlpConfig()
    tower = tower or sized_tower()
    model = GraftedModel.graft(tiny_model("llama"), tower, CONFIGS[method], projector=projector)
    positions = model.workflow().record.positions(TowerShape.of(tower))
    processor = GraftProcessor(tiny_tokenizer(), positions, 5, "chat", tower.preprocess)
    return Answerer(perturb(model), processor)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return made()


def images() -> list[Image.Image]:
    return [picture(*size, which=number % 2) for number, size in enumerate(SIZES)]


def logits(answerer: Answerer, conversations: list[Any], **more: Any) -> list[Tensor]:
    inputs = answerer.processor(conversations, padding_side="right")
    with torch.no_grad():
        out = answerer.model(**{**inputs, **more}, workflow="mm", use_cache=False).logits
    return [row[mask.bool()] for row, mask in zip(out, inputs["attention_mask"], strict=True)]


CHATS = [chat("one", images()[0]), chat("two", *images()[1:3]), chat("a longer one", images()[3])]


def test_the_batch_says_how_long_each_image_is(answerer: Answerer) -> None:
    inputs = answerer.processor(CHATS)
    wanted = [plan(size).entries for size in SIZES]
    assert len(set(wanted)) > 2
    assert inputs["image_lengths"].tolist() == wanted
    assert inputs["image_rows"].tolist() == [0, 1, 1, 2]
    assert inputs["image_sizes"].tolist() == [list(size) for size in SIZES]
    assert inputs["mm_token_type_ids"].sum(1).tolist() == [wanted[0], sum(wanted[1:3]), wanted[3]]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("projector", PROJECTORS, ids=lambda p: p.kind)
def test_a_row_is_the_same_alone_and_beside_others(method: str, projector: Any) -> None:
    answerer = made(method, projector)
    for row, messages in zip(logits(answerer, CHATS), CHATS, strict=True):
        (alone,) = logits(answerer, [messages])
        assert (row - alone).abs().max() < 1e-4
    other = chat("one", picture(*SIZES[0], which=1))
    assert (logits(answerer, [other])[0] - logits(answerer, CHATS)[0]).abs().max() > 1e-4


def test_the_pass_numbers_the_images(answerer: Answerer, monkeypatch: Any) -> None:
    seen: list[Any] = []
    graft = answerer.model.workflow().graft
    monkeypatch.setattr(graft, "begin", seen.append)
    inputs = answerer.processor(CHATS, padding_side="right")
    logits(answerer, CHATS)
    (state,) = seen
    assert state.image_lengths.tolist() == inputs["image_lengths"].tolist()
    assert state.image_rows.tolist() == [0, 1, 1, 2]
    assert state.images.shape[0] == int(inputs["image_lengths"].sum())
    at = state.ordinals
    assert torch.equal(at >= 0, inputs["mm_token_type_ids"] == 1)
    for number, piece in enumerate(state.images.split(state.image_counts.tolist())):
        assert torch.equal(state.features[at == number], piece)


def test_lengths_are_found_where_they_are_not_given(answerer: Answerer) -> None:
    given = logits(answerer, CHATS)
    found = logits(answerer, CHATS, image_lengths=None, image_rows=None)
    assert all(torch.equal(one, other) for one, other in zip(given, found, strict=True))


BAD_TENSORS = [
    ({"image_rows": torch.tensor([0, 1, 1, 2, 2])}, "image_sizes is of 4, image_rows is of 5"),
    ({"image_rows": torch.tensor([0, 1])}, "image_rows is of 2, image_lengths is of 4"),
    ({"image_rows": torch.tensor([0, 1, 1, 9])}, "names row 9: the batch has rows 0 to"),
    ({"image_rows": torch.tensor([-1, 1, 1, 2])}, "names row -1"),
    ({"image_rows": torch.ones(4)}, r"image_rows is \(4,\) of torch.float32: give integers"),
    ({"image_rows": torch.tensor([[0, 1, 1, 2]])}, r"image_rows is \(1, 4\)"),
    ({"image_rows": None}, "give both, or neither"),
    ({"image_lengths": None}, "give both, or neither"),
    ({"image_lengths": torch.tensor([6, 6])}, "image_lengths is of 2"),
    ({"image_sizes": torch.tensor([[8, 8], [8, 8]])}, "image_sizes is of 2, image_rows is of 4"),
    ({"image_sizes": torch.tensor([8, 8, 8, 8])}, r"give integers \(images, 2\)"),
    ({"pixel_values": None, "image_features": torch.zeros(4, 7)}, r"image_features are \(4, 7\)"),
    ({"pixel_values": None, "image_features": torch.zeros(16)}, r"image_features are \(16,\)"),
]


@pytest.mark.parametrize(("changes", "says"), BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(answerer: Answerer, changes: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        logits(answerer, CHATS, **changes)


@pytest.mark.parametrize("number", [3, 5])
def test_pixels_of_another_number_of_images_are_named(number: int) -> None:
    """A tower with one plan for all images needs no sizes that would tell."""
    answerer = made("llava", tower=tiny_tower())
    rows, lengths = torch.zeros(number, dtype=torch.long), torch.ones(number, dtype=torch.long)
    says = f"4 images were given, and image_rows and image_lengths are of {number}"
    with pytest.raises(UsageError, match=says):
        logits(answerer, CHATS, image_rows=rows, image_lengths=lengths)


def test_wrong_lengths_are_refused_with_row_image_and_numbers(answerer: Answerer) -> None:
    lengths = answerer.processor(CHATS)["image_lengths"]
    wrong = lengths.clone()
    wrong[2] += 1
    words = f"image 2 .row 1. has {wrong[2]} positions in its row, and takes"
    with pytest.raises(UsageError, match=f"{words} {lengths[2]} "):
        logits(answerer, CHATS, image_lengths=wrong)
    with pytest.raises(UsageError, match=f"row 1 has {lengths[1:3].sum()} image positions, and"):
        logits(answerer, CHATS, image_rows=torch.tensor([0, 1, 2, 2]))
    with pytest.raises(UsageError, match="give image_sizes"):
        logits(answerer, CHATS, image_sizes=None)


def test_an_image_that_takes_no_position_is_only_for_the_graft(answerer: Answerer) -> None:
    whole = answerer.processor(CHATS, padding_side="right")
    text = answerer.processor([chat("x")], padding_side="right")
    extra = answerer.processor([chat("x", images()[0])], padding_side="right")
    given = {
        **text,
        "pixel_values": extra["pixel_values"],
        "image_sizes": extra["image_sizes"],
        "image_lengths": torch.tensor([0]),
        "image_rows": torch.tensor([0]),
    }
    with torch.no_grad():
        got = answerer.model(**given, workflow="mm").logits
        wanted = answerer.model(**text, workflow="mm").logits
    assert torch.equal(got, wanted)
    assert whole["image_lengths"].min() > 0


def test_workflows_of_one_batch_may_have_different_projectors() -> None:
    """The rows of each workflow are what they are in a model that has it alone."""
    one, two = made(), made("llava", PoolConfig())
    workflow = two.model.workflow()
    workflow.name = "pooled"
    both = GraftedModel(one.model.base, sized_tower(), [one.model.workflow(), workflow])
    owners = [one, two, one]
    encoded = [each.processor.encode(c) for each, c in zip(owners, CHATS, strict=True)]
    inputs = one.processor.collate(encoded, "right")
    pixels = one.processor.pixels([image for row in encoded for image in row.images])
    names = ["mm", "pooled", "mm"]
    with torch.no_grad():
        found = both(**inputs, pixel_values=pixels, workflow=names, use_cache=False).logits
    for row, (owner, messages) in enumerate(zip(owners, CHATS, strict=True)):
        owner.model.workflow().name = "mm"
        alone = GraftedModel(one.model.base, sized_tower(), [owner.model.workflow()])
        (wanted,) = logits(Answerer(alone, owner.processor), [messages])
        assert (found[row][: len(wanted)] - wanted).abs().max() < 1e-4


def test_text_is_the_bases(answerer: Answerer) -> None:
    inputs = answerer.processor([[{"role": "user", "content": "hello"}]])
    assert "image_lengths" not in inputs
    with torch.no_grad():
        wanted = tiny_model("llama")(**{k: inputs[k] for k in ("input_ids", "attention_mask")})
        assert torch.equal(answerer.model(**inputs).logits, wanted.logits)


# -- generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_answers_in_a_batch_are_those_alone(answerer: Answerer, settings: dict[str, Any]) -> None:
    more = {"max_new_tokens": 4, "do_sample": False, **settings}
    alone = [answerer.answers([messages], **more)[0] for messages in CHATS]
    assert answerer.answers(CHATS, **more) == alone


def test_an_image_in_a_later_turn(answerer: Answerer) -> None:
    settings = {"max_new_tokens": 3, "do_sample": False}
    dialogue = Dialogue(answerer)
    for number, image in enumerate(images()):
        dialogue.add_image(image)
        before = list(dialogue.messages)
        said = dialogue.say(f"turn {number}", **settings)
        (fresh,) = answerer.answers([[*before, dialogue.messages[-2]]], **settings)
        assert said == fresh
        assert dialogue._cache is not None


def test_questions_that_share_an_image_read_it_once(answerer: Answerer) -> None:
    first, second = images()[0], images()[2]
    chats = [chat(text, image) for text in ("a", "bb") for image in (first, second)]
    rows = [answerer.processor.encode(messages) for messages in chats]
    with torch.no_grad():
        for chosen in (rows, rows[::2]):  # of two lengths, of one
            batch = answering._Batch(answerer.model, answerer.processor, chosen, None, "mm")
            together = batch.answers(4, ["x"] * len(chosen))
            for row, said in zip(chosen, together, strict=True):
                one = answering._Batch(answerer.model, answerer.processor, [row], None, "mm")
                assert one.answers(4, ["x"]) == [said]


# -- rows and batches ---------------------------------------------------------------------------


def rows() -> list[Row]:
    return [Row(str(n), [*messages, ANSWER]) for n, messages in enumerate(CHATS)]


def test_packed_rows_have_the_loss_of_padded_ones(answerer: Answerer) -> None:
    dataset = RowDataset(rows(), answerer.processor)
    examples = [dataset[at] for at in range(3)]
    collator = Collator(answerer.processor)
    plain = collator(examples)
    packed = PackCollator(collator)([Pack(examples[:2]), Pack(examples[2:])])
    assert packed["image_rows"].tolist() == [0, 0, 0, 1]
    for batch in (plain, packed):
        batch.pop("row_ids")
    with torch.no_grad():
        one, other = (answerer.model(**batch).loss for batch in (plain, packed))
    assert abs(float(one - other)) < 1e-5


def test_a_cut_leaves_images_whole(answerer: Answerer) -> None:
    whole = supervise(answerer.processor, [*CHATS[1], ANSWER])
    last = len(whole) - 1
    shorter = cut(whole, last, "row 1") if whole.spans[0][0] < last else whole
    assert shorter.lengths == whole.lengths
    first = whole.kinds.index(1)
    inside = first + whole.lengths[0] + 1
    part = whole.part(0, first + whole.lengths[0])
    assert (part.lengths, part.sizes) == (whole.lengths[:1], whole.sizes[:1])
    with pytest.raises(UsageError, match="hold nothing to learn"):
        cut(whole, inside, "row 1")


def test_a_preview_counts_each_images_positions(answerer: Answerer) -> None:
    pieces = preview_row(answerer.processor, rows()[1]).pieces
    found = [piece.positions for piece in pieces if piece.kind == "image"]
    assert found == [plan(size).entries for size in SIZES[1:3]]


@pytest.mark.parametrize("projector", PROJECTORS[2:], ids=lambda p: p.kind)
def test_a_preview_and_a_batch_count_what_a_resampler_makes(projector: Any) -> None:
    answerer = made("llava", projector)
    views = [len(plan(size).views) for size in SIZES[1:3]]
    each = {"perceiver": getattr(projector, "latents", 0), "qformer": 2}[projector.kind]
    wanted = [each * (1 if projector.per == "image" else n) for n in views]
    pieces = preview_row(answerer.processor, rows()[1]).pieces
    assert [piece.positions for piece in pieces if piece.kind == "image"] == wanted
    inputs = answerer.processor(CHATS[1:2])
    assert inputs["image_lengths"].tolist() == wanted
    assert int(inputs["mm_token_type_ids"].sum()) == sum(wanted)
