"""The text workflow of an IAA graft against the plain base: prefill, decode, and `generate`.

    python benchmarks/text_workflow.py [--pairs 40] [--tokens 128]

A base of SmolLM2's shape in fp32 with inserted layers, an own embedding, norm and head. Both sides
are the same object: through the grafted model, and the base itself.
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
from transformers.cache_utils import DynamicCache

from mmgraft import IAAConfig

LIMIT = 1.02
STEPS = 10
"""Decoding steps for each pair that was asked for: a step is short."""


def main() -> int:
    """Measure and print."""
    parser = options(__doc__, pairs=40)
    parser.add_argument("--tokens", type=int, default=128, help="of the prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens that generate makes")
    parser.add_argument("--layers", type=int, default=30, help="of the base")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    base = models.base(num_hidden_layers=chosen.layers)
    places = models.places(4, chosen.layers)
    model = models.grafted(base, IAAConfig(layers=places))
    ids = torch.randint(3, 20_000, (1, chosen.tokens), generator=torch.Generator().manual_seed(1))
    rows = [
        _row(name, pairs)
        for name, pairs in (
            ("prefill", prefill(model, base, ids, chosen)),
            ("decode", decode(model, base, ids, chosen)),
            ("generate", whole(model, base, ids, chosen)),
        )
    ]
    return show(chosen, rows)


def _row(name: str, pairs: Pairs) -> Row:
    ratio = pairs.ratio
    return Row(
        f"IAA text workflow, {name}",
        "the plain base",
        f"{ratio} of {ratio.pairs} pairs",
        f"below {LIMIT}",
        ratio.below(LIMIT),
        {"ratio": vars(ratio), "seconds": pairs.seconds},
    )


@torch.no_grad()
def prefill(ours: Any, theirs: Any, ids: Tensor, chosen: argparse.Namespace) -> Pairs:
    """A prompt into a fresh cache, and the logits of its last position."""

    def run(model: Any) -> Callable[[], Any]:
        return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return alternate(run(ours), run(theirs), pairs=chosen.pairs, clock=clock(chosen))


@torch.no_grad()
def decode(ours: Any, theirs: Any, ids: Tensor, chosen: argparse.Namespace) -> Pairs:
    """A token after the prompt, each side with its own cache."""

    def steps(model: Any) -> Callable[[], Any]:
        cache = DynamicCache(config=theirs.config)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = ids[:, :1]
        return lambda: model(input_ids=token, past_key_values=cache, use_cache=True)

    count = STEPS * chosen.pairs
    return alternate(steps(ours), steps(theirs), pairs=count, warm=4, clock=clock(chosen))


def whole(ours: Any, theirs: Any, ids: Tensor, chosen: argparse.Namespace) -> Pairs:
    """`generate`, greedily."""

    def run(model: Any) -> Callable[[], Any]:
        settings = {"max_new_tokens": chosen.new, "min_new_tokens": chosen.new, "do_sample": False}
        return lambda: model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **settings
        )

    return alternate(run(ours), run(theirs), pairs=chosen.pairs, clock=clock(chosen))


if __name__ == "__main__":
    sys.exit(main())
