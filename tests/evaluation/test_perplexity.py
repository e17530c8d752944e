from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.likelihood import likelihood, perplexity
from mmgraft.evaluation.likelihood.perplexity import (
    TextScore,
    Window,
    WindowScore,
    answer_window,
    measure_texts,
    rolling_windows,
    score_texts,
)
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.model.modeling import GraftedModel
from tiny import tiny_model, tiny_tower
from tiny_tokenizer import tiny_tokenizer

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "What colour?",
    "Is there a triangle in the image?\n\nNo, there is a circle and a rectangle in the image. " * 2,
    "ü",
)


def _processor(**options: Any) -> GraftProcessor:
    return GraftProcessor(tiny_tokenizer(**options), 4, 5)


def _items(texts: Sequence[str] = TEXTS) -> list[Item]:
    return [Item(str(at), messages=(), question=text) for at, text in enumerate(texts)]


def _harness(model: Any, tokenizer: Any, texts: Sequence[str], length: int) -> list[float]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=length)
    requests = [Instance("loglikelihood_rolling", {}, (text,), at) for at, text in enumerate(texts)]
    return lm.loglikelihood_rolling(requests, disable_tqdm=True)


def _sums(scores: Sequence[TextScore]) -> list[float]:
    return [sum(window.log_likelihood for window in score.windows) for score in scores]


def _reading(length: int) -> Any:
    """A model whose windows are so long."""
    model = tiny_model("llama")
    model.config.max_position_embeddings = length
    return model


@pytest.mark.parametrize("length", [7, 16, 128])
@pytest.mark.parametrize("add_bos", [False, True])
def test_log_likelihoods_are_those_of_the_harness(length: int, add_bos: bool) -> None:
    model, processor = _reading(length), _processor(add_bos=add_bos)
    found = score_texts(model, processor, _items(), batch_size=3)
    theirs = _harness(model, processor.tokenizer, TEXTS, length)
    assert _sums(found) == pytest.approx(theirs, abs=1e-3)
    assert len(found[0].windows) > 1 or length == 128


@pytest.mark.parametrize("arch", ["gpt2", "bloom", "gemma3", "qwen3_moe"])
def test_other_bases_agree_with_the_harness(arch: str) -> None:
    model, processor = tiny_model(arch), _processor()
    found = score_texts(model, processor, _items(), batch_size=3)
    theirs = _harness(model, processor.tokenizer, TEXTS, 128)
    assert _sums(found) == pytest.approx(theirs, abs=1e-3)


def test_perplexities_are_those_of_the_harness() -> None:
    """Its own counting of words and bytes, and its own weighted mean."""
    from lm_eval.api.metrics import weighted_perplexity
    from lm_eval.api.task import PerplexityTask

    model, processor = _reading(16), _processor()
    measured, _ = measure_texts(score_texts(model, processor, _items()))
    sums = _harness(model, processor.tokenizer, TEXTS, 16)
    counts: dict[str, Any] = {
        "word_perplexity": PerplexityTask.count_words,
        "byte_perplexity": PerplexityTask.count_bytes,
    }
    for name, count in counts.items():
        pairs = [(one, count(text)) for one, text in zip(sums, TEXTS, strict=True)]
        assert measured.values()[name] == pytest.approx(weighted_perplexity(pairs), rel=1e-4)
    tokens = sum(len(processor.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert measured.values()["perplexity"] == pytest.approx(math.exp(-sum(sums) / tokens), rel=1e-4)


@given(st.integers(0, 40), st.integers(1, 9))
def test_every_id_is_predicted_once_from_what_precedes_it(count: int, length: int) -> None:
    ids = list(range(1, count + 1))
    windows = rolling_windows(ids, 0, length)
    assert [one for window in windows for one in window.wanted] == ids
    for window in windows:
        assert len(window.given) <= length
        assert len(window.given) >= len(window.wanted)
        assert window.given == [one - 1 for one in _run(window)]


def _run(window: Window) -> list[int]:
    """The ids that follow each position of what is given."""
    return list(range(window.given[0] + 1, window.wanted[-1] + 1))


def test_windows_by_hand() -> None:
    assert rolling_windows([5, 6, 7, 8, 9], 1, 3) == [
        Window([1, 5, 6], [5, 6, 7]),
        Window([6, 7, 8], [8, 9]),  # as long as the first, though it predicts two
    ]
    assert rolling_windows([5], 1, 3) == [Window([1], [5])]
    assert rolling_windows([], 1, 3) == []


# -- KL -----------------------------------------------------------------------------------------


def test_kl_is_the_mean_over_positions_of_base_from_model() -> None:
    """A slow reference: one text, all logits, the sum written out."""
    model, base, processor = tiny_model("llama", seed=1), tiny_model("llama"), _processor()
    scores = score_texts(model, processor, _items(), base=base)
    expected, likelihood, positions = 0.0, 0.0, 0
    for text in TEXTS:
        ids = processor.tokenizer(text)["input_ids"]
        given = torch.tensor([[processor.tokenizer.bos_token_id, *ids[:-1]]])
        with torch.no_grad():
            p = base(given).logits[0].double().softmax(-1)
            q = model(given).logits[0].double().softmax(-1)
        expected += float((p * (p / q).log()).sum())
        likelihood += sum(float(p[at, index].log()) for at, index in enumerate(ids))
        positions += len(ids)
    measured, groups = measure_texts(scores)
    assert measured.values()["kl_to_base"] == pytest.approx(expected / positions, rel=1e-4)
    assert groups == ["0", "1", "2", "3"]
    before, _ = measure_texts(scores, of_base=True)
    assert before.values()["perplexity"] == pytest.approx(math.exp(-likelihood / positions))
    assert "kl_to_base" not in before.values()
    assert expected > 0.1


def test_of_a_chat_the_answer_alone_is_predicted_with_the_end_of_its_turn() -> None:
    """A slow reference: the chat rendered by the tokenizer itself, the sums written out."""
    model, base, processor = tiny_model("llama", seed=1), tiny_model("llama"), _processor()
    tokenizer: Any = processor.tokenizer
    chats = [
        Item("a", [{"role": "user", "content": "What colour?"}], "What colour?", ("no idea",)),
        Item("b", [{"role": "user", "content": "Is there a dog? " * 3}], "x", ("yes",)),
        Item(
            "c",
            [
                {"role": "user", "content": "Is there"},
                {"role": "assistant", "content": "a dog and a circle"},
                {"role": "user", "content": "What colour?"},
            ],
            "x",
            ("the dog",),
        ),
    ]
    found = score_texts(model, processor, chats, base=base, batch_size=2, chat=True)
    for score, item in zip(found, chats, strict=True):
        messages: Any = list(item.messages)
        head = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        said = f"{item.answers[0]}<|im_end|>"
        start = len(tokenizer(head, add_special_tokens=False)["input_ids"])
        ids = tokenizer(head + said, add_special_tokens=False)["input_ids"]
        (window,) = score.windows
        assert window.tokens == len(ids) - start
        with torch.no_grad():
            q, p = (one(torch.tensor([ids])).logits[0].log_softmax(-1) for one in (model, base))
        for name, logits in (("log_likelihood", q), ("base_log_likelihood", p)):
            expected = sum(float(logits[at - 1, ids[at]]) for at in range(start, len(ids)))
            assert getattr(window, name) == pytest.approx(expected, abs=1e-4)
        kl = (p.exp() * (p - q)).sum(-1)[start - 1 : len(ids) - 1].sum()
        assert window.kl == pytest.approx(float(kl), abs=1e-4)
        assert (score.words, score.bytes) == (len(item.answers[0].split()), len(item.answers[0]))
    measured, groups = measure_texts(found, together=["one", "two", "one"])
    assert groups == ["one", "two", "one"]
    assert measured.values()["kl_to_base"] > 0.01


def test_a_chat_longer_than_the_context_loses_its_beginning() -> None:
    processor = _processor()
    item = Item("a", [{"role": "user", "content": "What colour? " * 9}], "x", ("a dog",))
    whole = answer_window(processor, item, 500)
    short = answer_window(processor, item, 12)
    assert len(whole.given) > 20
    assert short == Window(whole.given[-12:], whole.wanted)
    assert whole.given[-len(whole.wanted) + 1 :] == whole.wanted[:-1]
    with pytest.raises(
        UsageError, match=r"item a: the answer has \d+ tokens, and the base reads 1"
    ):
        answer_window(processor, item, 1)


def test_a_frozen_bases_text_is_exactly_its_own() -> None:
    base = tiny_model("llama")
    model = GraftedModel.graft(tiny_model("llama"), tiny_tower(), IAAConfig(layers=[1]))
    scores = score_texts(model, _processor(), _items(), base=base)
    for score in scores:
        for window in score.windows:
            assert window.kl == 0.0
            assert window.log_likelihood == window.base_log_likelihood


def test_logits_that_are_minus_infinity_in_both_are_no_difference() -> None:
    one = torch.tensor([[0.0, -math.inf, 0.0]])
    sums = perplexity._compare(one, one, torch.tensor([0]))
    assert sums.tolist() == pytest.approx([-math.log(2), -math.log(2), 0.0])


# -- batches and stretches ----------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_long_windows_in_stretches_give_the_same(arch: str, monkeypatch: Any) -> None:
    model, base = tiny_model(arch), tiny_model(arch, seed=1)
    whole = score_texts(model, _processor(), _items(), base=base)
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 320 * 9)
    parts = score_texts(model, _processor(), _items(), base=base)
    for one, other in zip(whole, parts, strict=True):
        for left, right in zip(one.windows, other.windows, strict=True):
            assert left.tokens == right.tokens
            assert left.log_likelihood == pytest.approx(right.log_likelihood, abs=1e-4)
            assert left.kl == pytest.approx(right.kl, abs=1e-4)


def test_a_text_is_given_when_it_is_whole() -> None:
    model, processor = _reading(8), _processor()
    seen: list[TextScore] = []
    found = score_texts(
        model,
        processor,
        [*_items(), Item("none", messages=(), question="")],
        batch_size=2,
        on_result=lambda _, scores: seen.extend(scores),
    )
    assert sorted(seen, key=lambda one: one.id) == found
    assert found[4].windows == ()


def test_one_text_alone_is_drawn_by_windows() -> None:
    windows = (WindowScore(4, -8.0), WindowScore(2, -1.0))
    measured, groups = measure_texts([TextScore("a", words=3, bytes=12, windows=windows)])
    assert groups == [0, 1]
    assert measured.columns.tolist() == [[8.0, 4, 2.0, 8.0], [1.0, 2, 1.0, 4.0]]
    assert measured.values() == pytest.approx(
        {
            "perplexity": math.exp(9 / 6),
            "word_perplexity": math.exp(9 / 3),
            "byte_perplexity": math.exp(9 / 12),
        }
    )
    found = measured.scores(groups)["perplexity"]
    assert found.low < found.value < found.high
    assert np.isclose(found.high, math.exp(2))


def test_what_was_not_measured_is_refused() -> None:
    with pytest.raises(UsageError, match="base did not score"):
        measure_texts([TextScore("a", 1, 1, (WindowScore(1, -1.0),))], of_base=True)
    with pytest.raises(UsageError, match="no token"):
        measure_texts([TextScore("a", 1, 1, ())])
