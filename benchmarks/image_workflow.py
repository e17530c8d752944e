"""The image workflow of an IAA graft against transformers' Llava with the same (N + k) layers.

    python benchmarks/image_workflow.py [--pairs 20]

A base of SmolLM2's shape in fp32 with four inserted layers, an own embedding, norm and head; one
image of 576 tokens, given as the tower's features, and a question. Both sides use the same tensors,
and their logits are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import models
import torch
from pairs import Pairs, Row, alternate, clock, options, show
from torch import Tensor

from mmgraft import IAAConfig

LIMIT = 1.05
STEPS = 10
"""Decoding steps for each pair that was asked for: a step is short."""


def main() -> int:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--inserted", type=int, default=4, choices=sorted(models.PLACES))
    parser.add_argument("--new", type=int, default=16, help="tokens that generate makes")
    parser.add_argument("--layers", type=int, default=30, help="of the base")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    base = models.base(num_hidden_layers=chosen.layers)
    places = models.places(chosen.inserted, chosen.layers)
    ours = models.grafted(base, IAAConfig(layers=places))
    theirs = models.llava(ours)
    batch = models.conversation(ours, rows=1, before=24, answer=0)
    del batch["labels"]
    other = models.for_llava(batch)
    difference = _compare(ours, theirs, batch, other)
    rows = [
        _row(name, len(places), pairs)
        for name, pairs in (
            ("prefill", prefill(ours, theirs, batch, other, chosen)),
            ("decode", decode(ours, theirs, batch, other, chosen)),
            ("generate", whole(ours, theirs, batch, other, chosen)),
        )
    ]
    return show(chosen, rows, {"logits_differ_by": difference})


def _row(name: str, inserted: int, pairs: Pairs) -> Row:
    ratio = pairs.ratio
    return Row(
        f"IAA image workflow, {name}",
        f"transformers' Llava, N + {inserted} layers",
        f"{ratio} of {ratio.pairs} pairs",
        f"below {LIMIT}",
        ratio.below(LIMIT),
        {"ratio": vars(ratio), "seconds": pairs.seconds},
    )


@torch.no_grad()
def _compare(ours: Any, theirs: Any, batch: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of logits; the two are no pair where there is one."""
    first = ours(**batch, use_cache=False, logits_to_keep=8).logits
    second = theirs(**other, use_cache=False, logits_to_keep=8).logits
    difference = float((first - second).abs().max())
    if difference > 1e-4:
        raise SystemExit(f"the two models differ by {difference}: their speeds do not compare")
    return difference


@torch.no_grad()
def prefill(ours: Any, theirs: Any, batch: Any, other: Any, chosen: argparse.Namespace) -> Pairs:
    """Image and question into a fresh cache, and the logits of the last position."""

    def run(model: Any, given: Any) -> Callable[[], Any]:
        return lambda: model(**given, use_cache=True, logits_to_keep=1)

    first, second = run(ours, batch), run(theirs, other)
    return alternate(first, second, pairs=chosen.pairs, clock=clock(chosen))


@torch.no_grad()
def decode(ours: Any, theirs: Any, batch: Any, other: Any, chosen: argparse.Namespace) -> Pairs:
    """A token after them, each side with its own cache."""

    def steps(model: Any, given: Any) -> Callable[[], Any]:
        cache = model(**given, use_cache=True, logits_to_keep=1).past_key_values
        token = torch.full((1, 1), 5)
        return lambda: model(input_ids=token, past_key_values=cache, use_cache=True)

    count = STEPS * chosen.pairs
    first, second = steps(ours, batch), steps(theirs, other)
    return alternate(first, second, pairs=count, warm=4, clock=clock(chosen))


def whole(ours: Any, theirs: Any, batch: Any, other: Any, chosen: argparse.Namespace) -> Pairs:
    """`generate`, greedily."""

    def run(model: Any, given: Any) -> Callable[[], Any]:
        settings = {"max_new_tokens": chosen.new, "min_new_tokens": chosen.new, "do_sample": False}
        return lambda: model.generate(**given, **settings)

    count = max(2, chosen.pairs // 2)
    first, second = run(ours, batch), run(theirs, other)
    return alternate(first, second, pairs=count, clock=clock(chosen))


if __name__ == "__main__":
    sys.exit(main())
