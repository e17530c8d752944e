from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.likelihood import likelihood
from mmgraft.evaluation.likelihood.likelihood import score_choices
from mmgraft.evaluation.metrics.answers import ChoiceScore, shows_options
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.grafts.wings.config import WingsConfig
from mmgraft.model.modeling import GraftedModel
from tiny import tiny_model, tiny_tower
from tiny_tokenizer import tiny_tokenizer

OPTIONS = ("blue", "a circle and a rectangle", "no", "ü the dog does not mind")
CONTEXTS = (
    "Question: What colour is the square in the picture?\nAnswer:",
    "Is there a triangle?",
    "One, two, three images: describe what they have in common and how they differ.\n ",
    "x",
)


def _processor(template: str = "chat", **options: Any) -> GraftProcessor:
    return GraftProcessor(tiny_tokenizer(**options), 4, 5, template)


def _items(contexts: Sequence[str] = CONTEXTS, options: Sequence[str] = OPTIONS) -> list[Item]:
    """Items with two to four options, so that a batch has rows of its own for each."""
    return [
        Item(
            id=str(at),
            messages=[{"role": "user", "content": text}],
            question=text,
            options=tuple(options[: 2 + at % 3]),
            gold=at % 2,
        )
        for at, text in enumerate(contexts)
    ]


def _pairs(items: Sequence[Item]) -> list[tuple[str, str]]:
    return [(str(i.messages[0]["content"]), f" {one}") for i in items for one in i.options]


def _harness(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], **settings: Any):
    """Return what lm-evaluation-harness itself says of contexts and continuations."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, **settings)
    requests = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]
    return [found for found, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def _sharing(monkeypatch: pytest.MonkeyPatch, share: bool) -> None:
    """Without it, every option is read with its question."""
    if not share:
        monkeypatch.setattr(likelihood, "can_go_on", lambda config: False)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom", "opt", "gemma3", "mixtral"])
def test_log_probabilities_are_those_of_the_harness(
    arch: str, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sharing(monkeypatch, share)
    model, processor = tiny_model(arch), _processor()
    items = _items()
    found = score_choices(model, processor, items, chat=False, batch_size=3)
    theirs = _harness(model, processor.tokenizer, _pairs(items))
    assert [one for score in found for one in score.sums] == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("share", [True, False])
def test_a_beginning_of_sequence_and_an_empty_question_are_the_harnesss(
    share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sharing(monkeypatch, share)
    model, processor = tiny_model("llama"), _processor(add_bos=True)
    contexts = ("", "<|bos|>Is there", "Is there")
    items = _items(contexts)
    found = score_choices(model, processor, items, chat=False)
    theirs = _harness(model, processor.tokenizer, _pairs(items))
    assert [one for score in found for one in score.sums] == pytest.approx(theirs, abs=1e-4)
    assert found[1].sums[:2] == pytest.approx(found[2].sums[:2])  # not begun twice


@pytest.mark.parametrize("share", [True, False])
def test_what_is_too_long_loses_its_beginning_as_in_the_harness(
    share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sharing(monkeypatch, share)
    model, processor = tiny_model("llama", max_position_embeddings=24), _processor()
    items = _items()
    lengths = [len(processor.tokenizer(text)["input_ids"]) for text in CONTEXTS]
    assert min(lengths) < 24 < max(lengths)
    found = score_choices(model, processor, items, chat=False)
    theirs = _harness(model, processor.tokenizer, _pairs(items))
    assert [one for score in found for one in score.sums] == pytest.approx(theirs, abs=1e-4)


def test_accuracies_are_those_of_a_task_of_the_harness() -> None:
    """`acc` and `acc_norm` as its own multiple-choice task counts them."""
    import numpy as np

    model, processor = tiny_model("qwen2"), _processor()
    items = _items(CONTEXTS * 5)
    found = score_choices(model, processor, items, chat=False)
    for score, item in zip(found, items, strict=True):
        sums = np.array(_harness(model, processor.tokenizer, _pairs([item])))
        sizes = np.array([float(len(one)) for one in item.options])
        assert score.prediction("sum") == int(np.argmax(sums))
        assert score.prediction("character") == int(np.argmax(sums / sizes))


def test_log_probabilities_by_hand() -> None:
    """A slow reference: one row, one token at a time, no batch."""
    model, processor = tiny_model("llama"), _processor()
    (score,) = score_choices(model, processor, _items(["Is there a dog?"]), chat=False)
    tokenizer = processor.tokenizer
    for option, total, count in zip(OPTIONS, score.sums, score.tokens, strict=False):
        context = tokenizer("Is there a dog?")["input_ids"]
        rest = tokenizer(f"Is there a dog? {option}")["input_ids"][len(context) :]
        assert count == len(rest)
        expected = 0.0
        for at, token in enumerate(rest):
            with torch.no_grad():
                logits = model(torch.tensor([context + rest[:at]])).logits[0, -1]
            expected += float(logits.log_softmax(-1)[token])
        assert total == pytest.approx(expected, abs=1e-4)
    assert score.characters == (4, 24)


def test_the_three_ways_to_choose() -> None:
    score = ChoiceScore("1", sums=(-4.0, -6.0, -9.0), tokens=(1, 2, 6), characters=(2, 12, 9))
    assert [score.prediction(by) for by in ("sum", "token", "character")] == [0, 2, 1]
    assert score.scores("token") == [-4.0, -3.0, -1.5]
    tied = ChoiceScore("1", sums=(-2.0, -1.0, -1.0), tokens=(1, 1, 1), characters=(1, 1, 1))
    assert tied.prediction() == 1


# -- grafts, images and templates ---------------------------------------------------------------


@pytest.fixture(scope="module", params=["iaa", "wings"])
def grafted(request: pytest.FixtureRequest) -> tuple[GraftedModel, GraftProcessor]:
    tower = tiny_tower()
    config = IAAConfig(layers=[1, 2]) if request.param == "iaa" else WingsConfig(rank=4)
    model = GraftedModel.graft(tiny_model("llama"), tower, config)
    torch.manual_seed(0)
    for parameter in model.workflow().parameters():
        parameter.data.normal_(std=0.2)
    return model, GraftProcessor(tiny_tokenizer(), tower.num_patches, 5, "chat", tower.preprocess)


def _with_image(item: Item, colour: tuple[int, int, int]) -> Item:
    parts = [
        {"type": "image", "image": Image.new("RGB", (16, 16), colour)},
        {"type": "text", "text": item.question},
    ]
    messages = [{"role": "user", "content": parts}]
    return Item(id=item.id, messages=messages, question=item.question, options=item.options)


def test_an_image_item_is_scored_as_one_row_through_the_workflow(grafted) -> None:
    model, processor = grafted
    colours = [(250, 0, 0), (0, 0, 250), (9, 99, 9), (0, 0, 0)]
    items = [_with_image(*pair) for pair in zip(_items(), colours, strict=True)]
    items.insert(1, _items(["Is there"])[0])  # a row without an image runs the base
    found = score_choices(model, processor, items, batch_size=3)
    for item, score in zip(items, found, strict=True):
        for option, total in zip(item.options, score.sums, strict=True):
            answer = {"role": "assistant", "content": option}
            inputs = processor([[*item.messages, answer]], add_generation_prompt=False)
            prompt = len(processor.encode(item.messages))
            ids = inputs["input_ids"][0]
            end = prompt + score.tokens[item.options.index(option)]
            with torch.no_grad():
                logits = model(**inputs, use_cache=False).logits[0].log_softmax(-1)
            expected = sum(float(logits[at - 1, ids[at]]) for at in range(prompt, end))
            assert total == pytest.approx(expected, abs=1e-4)
            assert processor.decode(ids[prompt:end]) == option
    assert found[0].sums != pytest.approx(score_choices(model, processor, [items[2]])[0].sums)


def test_sharing_the_question_changes_nothing(grafted, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = grafted
    items = [_with_image(item, (30, 60, 90)) for item in _items()]
    shared = score_choices(model, processor, items, batch_size=3)
    _sharing(monkeypatch, False)
    whole = score_choices(model, processor, items, batch_size=3)
    for one, other in zip(shared, whole, strict=True):
        assert one.sums == pytest.approx(other.sums, abs=1e-4)


def test_given_features_are_used_instead_of_pictures(grafted) -> None:
    model, processor = grafted
    item = _with_image(_items()[0], (200, 100, 0))
    path = Item(
        id="1",
        messages=[{"role": "user", "content": [{"type": "image", "image": "x.png"}]}],
        question="",
        options=item.options,
    )
    asked: list[Any] = []

    def features(paths: list[Any]) -> torch.Tensor:
        asked.extend(paths)
        return torch.ones(len(paths), 4, 16)

    (one,) = score_choices(model, processor, [path], features=features)
    assert [path.name for path in asked] == ["x.png"]
    assert len(one.sums) == 2


def test_text_rows_ask_the_base_bit_for_bit(grafted) -> None:
    model, processor = grafted
    for chat in (True, False):
        ours = score_choices(model, processor, _items(), chat=chat)
        assert ours == score_choices(model.base, processor, _items(), chat=chat)


def test_an_option_begins_where_the_template_begins_the_answer() -> None:
    """This template puts a space before an answer, as Llama 2's does."""
    template = (
        "{% for m in messages %}{{ '[Q]' + m['content'] + '[A]' if m['role'] == 'user' "
        "else ' ' + m['content'] + '</s>' }}{% endfor %}"
    )
    model = tiny_model("llama")
    spaced = score_choices(model, _processor(chat_template=template), _items(["Is there a dog?"]))
    plain = _items(["[Q]Is there a dog?[A]"])
    assert spaced[0].sums == pytest.approx(
        score_choices(model, _processor(), plain, chat=False)[0].sums, abs=1e-4
    )


def test_letters_are_scored_where_the_prompt_shows_them() -> None:
    model, processor = tiny_model("llama"), _processor()
    (letters,) = score_choices(model, processor, _items(["x"]), chat=False, letters=True)
    (texts,) = score_choices(model, processor, _items(["x"], ["A", "B"]), chat=False)
    assert letters.sums == texts.sums
    assert letters.characters == (1, 1)
    assert shows_options("{question}\n{options}\nAnswer:")
    assert not shows_options("{question}")
    assert not shows_options(None)


# -- batches ------------------------------------------------------------------------------------


def test_results_come_batch_by_batch_and_in_order() -> None:
    model, processor = tiny_model("llama"), _processor()
    items = _items(CONTEXTS * 2)
    seen: list[str] = []
    found = score_choices(
        model,
        processor,
        items,
        batch_size=3,
        chat=False,
        on_result=lambda _, scores: seen.extend(score.id for score in scores),
    )
    assert [score.id for score in found] == [item.id for item in items]
    assert sorted(seen) == sorted(item.id for item in items)


def test_what_cannot_be_scored_is_refused(grafted) -> None:
    model, processor = grafted
    seen = _with_image(_items()[0], (0, 0, 0))
    with pytest.raises(UsageError, match="an image cannot be written as plain text"):
        score_choices(model, processor, [seen], chat=False)
    with pytest.raises(UsageError, match="no workflow"):
        score_choices(model, processor, [seen], workflow="other")
    long = Item("7", seen.messages, "x", options=("a", "a dog " * 80))
    with pytest.raises(UsageError, match=r"\(id 7\)|item 7.*positions"):
        score_choices(model, processor, [long])
