"""Every invariant of a grafted model, as functions that say what is wrong.

Each returns None where the invariant holds, else how far off the model is. `tests/model` asserts
the same of the promised architectures in more cases.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decoding import changed_at, in_chunks
from grafting import Row, batch, cross_entropy, logits_of, own, row, text_labels, text_of
from grafting import trained_groups as groups_of
from mmgraft import GraftedModel

TEXTS = ("ttttttttttttt", "tttttttt", "ttttttttttt")
MIXED = ("tttttttt", "ttttiiiittttttttt", "tiiiiiiiit", "iiiittiiiittttt", "ttttttttttt")
CHUNKED = ("ttiiiitttiiiittt", "ttttiiiittttttttttt", "ttttttttttttt")
CAUSAL = ("iiiitttttttttttt", "ttttttiiiitttttt", "ttttttttttttiiii")
NEAR = 1e-4
"""Bound as a share of the logits' size: rounding is far below, a mistake far above."""


@dataclass
class Case:
    """A grafted model with noise on every tensor of its graft, and the base by itself."""

    base: PreTrainedModel
    model: GraftedModel
    width: int

    def rows(self, words: Sequence[str]) -> list[Row]:
        return [row(word, 100 * n, width=self.width) for n, word in enumerate(words)]

    def apart(self, one: Tensor, other: Tensor) -> str | None:
        """Say how far two logits are from each other, if they are."""
        if one.shape != other.shape:
            return f"shape {tuple(one.shape)}, not {tuple(other.shape)}"
        far = (one.float() - other.float()).abs().max().item()
        size = max(1.0, other.float().abs().max().item())
        return None if far <= NEAR * size else f"differs by {far:.2g} of {size:.2g}"


def text_is_the_bases(case: Case) -> str | None:
    for side in ("left", "right"):
        inputs = batch(case.rows(TEXTS), side)
        if not torch.equal(logits_of(case.model, inputs), logits_of(case.base, inputs)):
            return f"padded on the {side}: not the base's bit for bit"
    return None


def cached_is_full(case: Case) -> str | None:
    """Unpadded, one token at a time; padded on the left; in chunks."""
    one = batch(case.rows(["ttiiiittttt"]))
    several = batch(case.rows(CHUNKED), "left")
    found = {
        "one by one": (one, (7, 8, 9, 10, 11)),
        "chunked": (one, (6, 9, 11)),
        "padded on the left": (several, (16, 17, 18, 19)),
        "padded and chunked": (several, (12, 16, 17, 18, 19)),
    }
    for name, (inputs, ends) in found.items():
        real = inputs["attention_mask"].bool()
        cached = in_chunks(case.model, inputs, ends)[real]
        if wrong := case.apart(cached, logits_of(case.model, inputs)[real]):
            return f"{name}: {wrong}"
    return None


def later_moves_nothing_earlier(case: Case) -> str | None:
    inputs = batch(case.rows(CAUSAL))
    before = logits_of(case.model, inputs)
    for column in (4, 8, 14):
        after = logits_of(case.model, changed_at(inputs, column))
        if wrong := case.apart(after[:, :column], before[:, :column]):
            return f"column {column}: {wrong}"
        if not case.apart(after[:, column:], before[:, column:]):
            return f"column {column} moves nothing at all"
    return None


def rows_are_alone(case: Case) -> str | None:
    """Neighbours and padding do not matter, and a text row is the base's."""
    rows = case.rows(MIXED)
    alone = [logits_of(case.model, batch([each]))[0] for each in rows]
    alone[0] = logits_of(case.base, text_of(batch([rows[0]])))[0]
    for side in ("left", "right"):
        inputs = batch(rows, side, length=20)
        found = own(logits_of(case.model, inputs), inputs)
        for number, (mine, wanted) in enumerate(zip(found, alone, strict=True)):
            if wrong := case.apart(mine, wanted):
                return f"{MIXED[number]} padded on the {side}: {wrong}"
    return None


def images_matter(case: Case) -> str | None:
    inputs = batch(case.rows(["ttiiiittttt"]))
    other = {**inputs, "image_features": inputs["image_features"] + 1.0}
    if case.apart(logits_of(case.model, other), logits_of(case.model, inputs)):
        return None
    return "another image gives the same logits"


def generates(case: Case) -> str | None:
    """Greedy, padded on the left, against the full forward of each row alone."""
    rows = case.rows(("ttiiiitttt", "tttiiiittttttt", "tttttt"))
    inputs = batch(rows, "left")
    made = case.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    start = inputs["input_ids"].shape[1]
    for number, each in enumerate(rows):
        alone = batch([each])
        for step in range(3):
            logits = logits_of(case.model, alone)[0, -1]
            token = made[number, start + step : start + step + 1]
            top = logits.masked_fill(_stops(case, logits), float("-inf")).max()
            if top - logits[token] > NEAR * max(1.0, logits.abs().max().item()):
                return f"row {number}, token {step}: not the full forward's"
            alone = _longer(alone, token[None])
    return None


def _stops(case: Case, logits: Tensor) -> Tensor:
    """True at end tokens, which `min_new_tokens` keeps away."""
    ends: Any = case.model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return torch.isin(torch.arange(len(logits)), torch.tensor(ends, dtype=torch.long))


def _longer(inputs: dict[str, Tensor], token: Tensor) -> dict[str, Tensor]:
    fill = {"input_ids": token, "attention_mask": torch.ones_like(token)}
    fill["mm_token_type_ids"] = torch.zeros_like(token)
    return {k: torch.cat([v, fill[k]], 1) if k in fill else v for k, v in inputs.items()}


def saves_and_loads(case: Case) -> str | None:
    inputs = batch(case.rows(("ttiiiitttt", "tttttt")))
    expected = logits_of(case.model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        again = GraftedModel.from_pretrained(folder)
        return case.apart(logits_of(again, inputs), expected)


def one_step_of_training(case: Case) -> str | None:
    """The loss is that of the logits, every trained tensor gets a gradient, text stays."""
    model = case.model
    model.set_trainable(groups_of(model.workflow().graft.method))
    inputs = batch(case.rows(("ttiiiittttt", "tttttttt")), "right")
    labels = text_labels(inputs)
    expected = cross_entropy(logits_of(model, inputs), labels)
    found = model(**inputs, labels=labels).loss
    if abs(found.item() - expected.item()) > 1e-3 * max(1.0, expected.item()):
        return f"a loss of {found.item():.4g}, and {expected.item():.4g} from the logits"
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    model(**inputs, labels=labels).loss.backward()
    model.eval()
    if not all(p.grad is None or bool(p.grad.isfinite().all()) for p in trained):
        return "a gradient is not finite"
    if not any(p.grad is not None and bool(p.grad.any()) for p in trained):
        return "no gradient"
    torch.optim.SGD(trained, lr=1e-2).step()
    model.requires_grad_(False)
    return text_is_the_bases(case)


INVARIANTS: dict[str, Callable[[Case], str | None]] = {
    "text": text_is_the_bases,
    "images": images_matter,
    "causality": later_moves_nothing_earlier,
    "batch": rows_are_alone,
    "cache": cached_is_full,
    "generate": generates,
    "save": saves_and_loads,
    "training": one_step_of_training,
}
"""Training comes last: it changes the model."""


def broken(case: Case, names: Sequence[str] = tuple(INVARIANTS)) -> dict[str, str]:
    """Return those of the named invariants that do not hold, each with what was seen."""
    found: dict[str, str] = {}
    for name in names:
        try:
            wrong = INVARIANTS[name](case)
        except Exception as error:  # whatever a base may raise: the finding of a sweep
            wrong = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        if wrong is not None:
            found[name] = wrong
    return found
