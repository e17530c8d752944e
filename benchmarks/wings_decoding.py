"""Wings' cached decoding against recomputing everything, and against the base's own.

    python benchmarks/wings_decoding.py [--contexts 600 2048] [--pairs 20] [--recomputed 2] [--json]

One row with an image of 576 positions and text up to the context, then token by token. The explicit
side runs the whole row again for each token, with attention maps written out and logits of all
positions, as the published code does. The base decodes a text of the same length from its cache.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from explicit_wings import explicit_logits, row_of, shape_options, wings
from pairs import Ratio, Row, alternate, clock, options, show
from torch import Tensor
from transformers import DynamicCache

from mmgraft.model.modeling import GraftedModel

FASTER = {600: 20.0, 2048: 100.0}
BESIDE_BASE = {600: 1.6, 2048: 2.0}


class Decoding:
    """A model that has read a row, and then decodes it token by token."""

    def __init__(self, model: Any, row: dict[str, Tensor], **options: Any) -> None:
        self.model, self.options = model, options
        self.mask, self.cache = row["attention_mask"], DynamicCache(config=_config(model))
        out = model(**row, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **options)
        self.logits = out.logits[:, -1]
        self.token = row["input_ids"][:, -1:]

    def step(self) -> None:
        """One more token: of the row's last id, since time does not depend on which."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        out = self.model(
            input_ids=self.token,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **self.options,
        )
        self.logits = out.logits[:, -1]


def main() -> int:
    """Measure at every context; two rows each."""
    parser = shape_options(options(__doc__))
    parser.add_argument("--contexts", type=int, nargs="+", default=list(FASTER))
    parser.add_argument("--recomputed", type=int, default=2, help="tokens by recomputing")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = wings(given)
    rows = []
    with torch.inference_mode():
        for context in given.contexts:
            rows += _at(model, context, given)
    return show(given, rows)


def _at(model: GraftedModel, context: int, given: argparse.Namespace) -> list[Row]:
    row = {k: v for k, v in row_of(model, context, answer=8).items() if k != "labels"}
    text = {"input_ids": row["input_ids"].clamp(max=given.vocab - 1)}
    text["attention_mask"] = row["attention_mask"]
    ours, base = Decoding(model, row, workflow="mm"), Decoding(model.base, text)
    ours.step()
    decoded, whole = ours.logits, _Whole(model, row, ours.token)
    beside = alternate(ours.step, base.step, pairs=given.pairs, clock=clock(given))
    again = alternate(ours.step, whole, pairs=given.recomputed, warm=0, clock=clock(given))
    torch.testing.assert_close(decoded, whole.logits, atol=1e-3, rtol=1e-3)
    faster: Ratio = again.ratio.inverse()
    slow, quick = FASTER.get(context), BESIDE_BASE.get(context)
    what = f"Wings decoding at a context of {context}, time per token"
    return [
        Row(
            what,
            "everything recomputed for each token",
            f"{faster.median:.0f} [{faster.low:.0f}, {faster.high:.0f}] times faster "
            f"({again.seconds[0] * 1e3:.0f} ms of {again.seconds[1]:.1f} s)",
            "reported" if slow is None else f"{slow:g}x faster",
            True if slow is None else _not(faster.below(slow)),
            {"seconds": again.seconds},
        ),
        Row(
            what,
            "the base's own cached decoding",
            f"{beside.ratio}x ({beside.seconds[0] * 1e3:.0f} of {beside.seconds[1] * 1e3:.0f} ms)",
            "reported" if quick is None else f"within {quick:g}x",
            True if quick is None else beside.ratio.below(quick),
            {"seconds": beside.seconds},
        ),
    ]


class _Whole:
    """The first decoded token again, by computing the whole row."""

    def __init__(self, model: GraftedModel, row: dict[str, Tensor], token: Tensor) -> None:
        kinds = torch.nn.functional.pad(row["mm_token_type_ids"], (0, 1))
        ids = torch.cat([row["input_ids"], token], dim=1)
        self.model, self.row = model, {**row, "input_ids": ids, "mm_token_type_ids": kinds}
        self.logits: Tensor | None = None

    def __call__(self) -> None:
        self.logits = explicit_logits(self.model, self.row)[:, -1]


def _config(model: Any) -> Any:
    return getattr(model, "base", model).config


def _not(found: bool | None) -> bool | None:
    return None if found is None else not found


if __name__ == "__main__":
    raise SystemExit(main())
