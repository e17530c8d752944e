"""Several rows in one sequence compute what each computes alone: logits, loss and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from grafting import (
    CONFIGS,
    Row,
    batch,
    distance,
    every_architecture,
    graft_on,
    grafted,
    logits_of,
    perturb,
    rows,
    text_labels,
    trained_groups,
)
from mmgraft.data.batches.sequences import begins, learned_within, number
from mmgraft.errors import UsageError

WORDS = ("ttiiiittttttttttttt", "tttiiiit", "iiiitttiiiitt", "ttttttttttt")
PACKS = ((0, 1, 3), (2,))
"""The second sequence is shorter, so that there is padding."""

BLOCKED = {
    "opt": "one row see another",
    "bloom": "takes no positions",
    "falcon": "one row see another",
    "gpt_oss": "one row see another",
}
"""Bases whose code in transformers makes no mask from positions."""


def packed(made: Sequence[Row], packs: Sequence[Sequence[int]] = PACKS) -> dict[str, Tensor]:
    """Rows of a pack one behind another; padding on the right has a number of its own: 0."""

    def sequences(of: Any) -> Tensor:
        each = [torch.cat([of(made[at], n) for n, at in enumerate(pack)]) for pack in packs]
        return torch.nn.utils.rnn.pad_sequence(each, batch_first=True)

    return {
        "input_ids": sequences(lambda row, n: row.ids),
        "mm_token_type_ids": sequences(lambda row, n: row.kinds),
        "segments": sequences(lambda row, n: torch.full((len(row),), n + 1)),
        "image_features": torch.cat([made[at].features for pack in packs for at in pack]),
    }


def of_rows(logits: Tensor, segments: Tensor) -> list[Tensor]:
    """Logits of every row of a packed batch, in order."""
    return [
        sequence[numbers == one]
        for sequence, numbers in zip(logits, segments, strict=True)
        for one in numbers[numbers > 0].unique()
    ]


@every_architecture
@pytest.mark.parametrize("method", ["iaa-c", "wings", "lora", "lora-token", "expert", "xattn"])
def test_each_row_is_what_it_is_alone(arch: str, method: str) -> None:
    """A mask that lets rows see one another, or positions that go on, change the later rows."""
    model, made = grafted(arch, method), rows(*WORDS)
    inputs = packed(made)
    if arch in BLOCKED:
        with pytest.raises(UsageError, match=BLOCKED[arch]):
            model(**inputs, workflow="mm")
        return
    logits = of_rows(logits_of(model, inputs, workflow="mm"), inputs["segments"])
    for at, found in zip([at for pack in PACKS for at in pack], logits, strict=True):
        alone = logits_of(model, batch([made[at]]), workflow="mm")[0]
        assert distance(found, alone) < 2e-5, WORDS[at]


def test_each_row_is_what_it_is_alone_where_attention_is_watched() -> None:
    """A watched graft reads the keys of all positions, by another mask than a training's."""
    model, made = perturb(graft_on("llama", CONFIGS["wings"])), rows(*WORDS)
    model.workflow().graft.watch = lambda *seen: None
    inputs = packed(made)
    logits = of_rows(logits_of(model, inputs, workflow="mm"), inputs["segments"])
    for at, found in zip([at for pack in PACKS for at in pack], logits, strict=True):
        alone = logits_of(model, batch([made[at]]), workflow="mm")[0]
        assert distance(found, alone) < 2e-5, WORDS[at]


def trained(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The loss and every gradient of a step."""
    model.zero_grad()
    loss = model(**inputs, labels=labels, workflow="mm").loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["iaa-a", "iaa-c", "wings", "llava", "lora", "expert", "xattn"])
def test_loss_and_gradients_are_those_of_rows_apart(method: str, attention: str) -> None:
    """Also where layers are computed again in the backward pass."""
    model = perturb(graft_on("llama", CONFIGS[method], attention=attention))
    groups = set(model.set_trainable(trained_groups(method)))
    model.train()
    made = rows(*WORDS)
    whole = batch([made[at] for pack in PACKS for at in pack])
    wanted = trained(model, whole, text_labels(whole))
    assert groups <= wanted.keys()
    inputs = packed(made)
    learned = (inputs["segments"] > 0) & (inputs["mm_token_type_ids"] == 0)
    labels = inputs["input_ids"].masked_fill(~learned, -100)  # with the first token of every row
    for again in (False, True):
        model.gradient_checkpointing = again
        found = trained(model, inputs, labels)
        assert found.keys() == wanted.keys()
        for name, one in wanted.items():
            torch.testing.assert_close(found[name], one, atol=2e-5, rtol=1e-3, msg=name)


def test_text_rows_that_train_the_base() -> None:
    model = perturb(graft_on("qwen2", CONFIGS["llava"]))
    model.set_trainable(["projector", "base"])
    model.train()
    made = rows("ttttttt", "tttt", "tttttttttt")
    apart = batch(made)
    wanted = model(**apart, labels=text_labels(apart)).loss
    inputs = packed(made, [(0, 1), (2,)])
    del inputs["image_features"], inputs["mm_token_type_ids"]
    labels = inputs["input_ids"].masked_fill(inputs["segments"] == 0, -100)
    assert model(**inputs, labels=labels).loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    model.eval()
    found = of_rows(logits_of(model, inputs), inputs["segments"])
    for mine, one in zip(found, made, strict=True):
        assert distance(mine, logits_of(model, batch([one]))[0]) < 2e-5


def test_no_row_feels_another() -> None:
    """To the bit: other tokens and another picture in the first row change the first row only."""
    model, made = grafted("gemma3", "wings"), rows(*WORDS)
    inputs = packed(made)
    before = of_rows(logits_of(model, inputs, workflow="mm"), inputs["segments"])
    other = rows(*WORDS, seed=7)
    changed = packed([other[0], *made[1:]])
    after = of_rows(logits_of(model, changed, workflow="mm"), changed["segments"])
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [
        False, True, True, True
    ]  # fmt: skip


def test_a_kernel_that_tells_rows_apart_in_one_sequence_only_is_refused_for_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As flash attention does, which takes its lengths from the positions of a single sequence."""
    model = graft_on("llama", CONFIGS["llava"])
    original = model.base.base_model.forward

    def forward(input_ids: Tensor | None = None, **given: Any) -> Any:
        first = input_ids if input_ids is not None else given["inputs_embeds"]
        if len(first) > 1:
            given["position_ids"] = torch.arange(first.shape[1])[None]
        return original(input_ids=input_ids, **given)

    monkeypatch.setattr(model.base.base_model, "forward", forward)
    made = rows(*WORDS)
    model(**packed(made, [(0, 1)]))
    with pytest.raises(UsageError, match="see another where a batch has several sequences"):
        model(**packed(made))


def test_numbers_and_positions() -> None:
    """A number may come again behind another row, and is another row then."""
    numbers, positions = number(torch.tensor([[1, 1, 2, 1, 1, 0, 0], [4, 4, 4, 4, 4, 4, 4]]))
    assert numbers.tolist() == [[1, 1, 2, 3, 3, 0, 0], [1] * 7]
    assert positions.tolist() == [[0, 1, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]


def test_no_row_is_asked_for_the_beginning_of_the_next() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]])
    assert begins(segments).tolist() == [[True, False, True, False, False, True]]
    labels = torch.tensor([[10, 11, 12, 13, 14, 15]])
    assert learned_within(labels, segments).tolist() == [[-100, 11, -100, 13, 14, -100]]


def test_what_does_not_go_with_several_rows() -> None:
    model, inputs = grafted("llama", "llava"), packed(rows(*WORDS))
    with pytest.raises(UsageError, match="give every position the number of its row"):
        model(**{**inputs, "segments": inputs["segments"][:, 1:]})
    cache = model(**batch(rows("tiiiit")), use_cache=True).past_key_values
    with pytest.raises(UsageError, match="takes no cache"):
        model(**inputs, past_key_values=cache)
