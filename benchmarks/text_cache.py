"""Time to the first token of an image turn after text: from the text's cache, and read anew.

    python benchmarks/text_cache.py [--pairs 10] [--tokens 2000] [--method lora]

A dialogue of `--tokens` positions of text lies in a cache that the text workflow filled; then comes
a turn with an image of 576 vectors and 32 positions of text. The base has SmolLM2's shape, in fp32;
the graft is LLaVA's projector, adapters of rank 64 at image positions, or 8 blocks that read the
image beside the sequence. Timed is the forward pass to the logits of the next token, the copy of
the cache left out.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import models
import torch
from pairs import Row, alternate, clock, options, show
from transformers.cache_utils import DynamicCache

from mmgraft import LlavaConfig, LoraConfig, XattnConfig
from mmgraft.vision.plan import Plan

TURN = 32
METHODS = {"llava": LlavaConfig(), "lora": LoraConfig(gate="token"), "xattn": XattnConfig()}


def main() -> int:
    """Measure and print."""
    parser = options(__doc__, pairs=10)
    parser.add_argument("--tokens", type=int, default=2000, help="of text before the image")
    parser.add_argument("--layers", type=int, default=30, help="of the base")
    parser.add_argument("--method", action="append", choices=METHODS, help="may be repeated")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = [measured(name, chosen) for name in chosen.method or METHODS]
    return show(chosen, rows)


@torch.no_grad()
def measured(name: str, chosen: Any) -> Row:
    """One method's row of the table."""
    model = models.grafted(models.base(num_hidden_layers=chosen.layers), METHODS[name])
    generator = torch.Generator().manual_seed(1)
    taken = model.workflow().positions(Plan.of_count(models.IMAGE_TOKENS))
    new = taken + TURN
    ids = torch.randint(3, 20_000, (1, chosen.tokens + new), generator=generator)
    kinds = torch.zeros_like(ids)
    kinds[:, chosen.tokens : chosen.tokens + taken] = 1
    width = model.base.config.hidden_size
    shown = torch.randn(1, models.IMAGE_TOKENS, width, generator=generator)
    whole = {"input_ids": ids, "mm_token_type_ids": kinds, "image_features": shown}
    last = {**whole, "input_ids": ids[:, -new:], "mm_token_type_ids": kinds[:, -new:]}
    held = DynamicCache(config=model.base.config)
    model(input_ids=ids[:, : chosen.tokens], past_key_values=held, logits_to_keep=1)
    waiting: list[Any] = []

    def logits(inputs: Any, cache: Any) -> Any:
        return model(**inputs, past_key_values=cache, logits_to_keep=1).logits

    def go_on() -> Any:
        return logits(last, waiting.pop())

    def anew() -> Any:
        return logits(whole, DynamicCache(config=model.base.config))

    def prepared(tick: Callable[[], float]) -> Callable[[], float]:
        """The clock; once it has been read, a copy of the cache waits for the next call."""

        def read() -> float:
            now = tick()
            if not waiting:
                waiting.append(copy.deepcopy(held))
            return now

        return read

    waiting.append(copy.deepcopy(held))
    apart = (go_on() - anew()).abs().max().item()
    waiting.append(copy.deepcopy(held))
    pairs = alternate(go_on, anew, pairs=chosen.pairs, warm=0, clock=prepared(clock(chosen)))
    ours, theirs = pairs.seconds
    return Row(
        f"first token of an image turn after {chosen.tokens:,} tokens of text, {name}",
        "everything read again",
        f"{pairs.ratio.inverse()} times faster ({ours:.2f} of {theirs:.2f} s); logits within "
        f"{apart:.1g}",
        "reported",
        None,
        {"ratio": vars(pairs.ratio), "seconds": pairs.seconds, "apart": apart},
    )


if __name__ == "__main__":
    sys.exit(main())
