"""Check how often the host waits for the card.

Each wait empties the card's queue, so a new ``.item()`` or boolean mask in a pass costs time that
no CPU test sees. Counted are all waits of a pass, transformers' own too: one a decoded token, and
those of padded rows' masks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from grafting import CONFIGS, batch, graft_on, perturb, rows, text_labels, trained_groups
from mmgraft import GraftedModel
from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.evaluation.likelihood.likelihood import Likelihoods, Request
from mmgraft.training.run import plan_training
from mmgraft.training.session import Session
from pretend_cuda import CARD, Card
from tiny_runs import make_parts, make_run, write_recipe

ROWS = {"even": ("ttiiiitt", "tiiiittt"), "mixed": ("ttiiiitt", "ttttt")}
CEILINGS = {  # waits of a decoded token and of a training forward
    ("llava", "even"): (1, 6),
    ("iaa-c", "even"): (1, 6),
    ("wings", "even"): (2, 8),
    ("lora", "even"): (1, 6),
    ("lora-token", "even"): (1, 7),
    ("llava", "mixed"): (3, 9),
    ("iaa-c", "mixed"): (3, 9),
    ("wings", "mixed"): (4, 12),
    ("lora", "mixed"): (4, 10),
    ("xattn", "even"): (1, 8),
    ("xattn", "mixed"): (3, 11),
}
OF_A_STEP = {"llava": 8, "iaa": 8, "wings": 11, "lora": 8, "xattn": 10}


def there(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(CARD) for name, tensor in inputs.items()}


def on_card(method: str, **base: Any) -> GraftedModel:
    return perturb(graft_on("llama", CONFIGS[method], base=base)).to(CARD)


def generated(card: Card, model: GraftedModel, side: str, tokens: int) -> Card:
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    with card.counting() as seen:
        model.generate(
            **there(batch(rows(*ROWS[side]), "left")), **length, do_sample=False, pad_token_id=0
        )
    return seen


@pytest.mark.parametrize(("method", "side"), CEILINGS)
def test_waits_of_a_token_and_of_a_training_pass(card: Card, method: str, side: str) -> None:
    of_token, of_forward = CEILINGS[method, side]
    model = on_card(method)
    few, many = (generated(card, model, side, tokens).waits for tokens in (2, 4))
    assert (many - few).total() <= 2 * of_token, many - few
    model.set_trainable(trained_groups(method))
    inputs = batch(rows(*ROWS[side]))
    labels, inputs = text_labels(inputs).to(CARD), there(inputs)
    with card.counting() as forward, torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model.train()(**inputs, labels=labels).loss
    with card.counting() as backward:
        loss.backward()
    assert forward.count <= of_forward, forward.report()
    assert backward.count == 0, backward.report()
    assert not any(kernel.startswith("math") for kernel, _ in forward.attention), forward.report()


class Reader:
    """Stand-in for a processor, with what scoring asks."""

    pad_id, tokenizer = 0, SimpleNamespace(model_max_length=128)
    images_of = GraftProcessor.images_of


@pytest.mark.parametrize("continuations", [[[3], [4]], [[3, 4], [4, 5, 6], [7]], [[3, 4]] * 40])
@pytest.mark.parametrize("method", ["llava", "iaa-c", "wings"])
def test_an_evaluation_batch_waits_once(card: Card, method: str, continuations: Any) -> None:
    """Wait once for its scores, however many; of images' rows the forwards' own waits remain."""
    model = on_card(method)
    width = model.workflow().projector.in_features
    tower: Any = lambda paths: torch.randn(len(paths), 4, width)  # noqa: E731
    sees = Encoded([5, 1, 1, 1, 1, 6], [0, 1, 1, 1, 1, 0], ["a.png"], (), (4,))
    for workflow, first in (("text", Encoded([5, 6], [0, 0], [])), ("mm", sees)):
        longer = replace(first, input_ids=[*first.input_ids, 7], kinds=[*first.kinds, 0])
        scores = Likelihoods(model, Reader(), workflow, tower)  # type: ignore[arg-type]
        requests = [Request(context, continuations) for context in (first, longer)]
        with card.counting() as seen:
            found = scores.score(requests)
        assert [len(one) for one in found] == [len(continuations)] * 2
        ours = {place: n for place, n in seen.waits.items() if "transformers/" not in str(place)}
        of_scores = {place: n for place, n in ours.items() if "mmgraft/evaluation" in str(place)}
        assert sum(of_scores.values()) == 1, seen.report()
        if workflow == "text":
            assert ours == of_scores, seen.report()


class Waits(TrainerCallback):
    """Keeps what the card had waited for at the end of each step."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.seen: list[Counter[tuple[str, str]]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(self.card.waits.copy())


@pytest.mark.parametrize("method", OF_A_STEP)
def test_waits_of_a_step(card: Card, tmp_path: Path, method: str) -> None:
    run = make_run(make_parts(tmp_path), tmp_path / "run", method)
    train = ["projector"] if method == "llava" else ["projector", "graft"]
    stage = {"name": "tune", "train": train, "lr": 1e-3, "batch_size": 2, "max_steps": 3}
    write_recipe(run, tmp_path, method, [stage], precision="bf16", log_every=9, workers=0)
    waits = Waits(card)
    Session(plan_training(run, device="cuda"), lambda text: None).run_stage(0, [waits])
    of_step = waits.seen[2] - waits.seen[1]
    assert of_step.total() <= OF_A_STEP[method], of_step
