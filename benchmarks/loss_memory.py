"""Memory of the loss, forward and backward, with a small vocabulary and a large one.

    python benchmarks/loss_memory.py [--positions 2048]

The loss of `--positions` supervised positions of width 576 against a head that is frozen: peak
resident memory above hidden states and head, in a process for each vocabulary. Beside it full
logits, and the same with a head that is trained, whose gradient is as large as the head.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from pairs import Peak, Row, in_child, options, show
from torch import nn
from torch.nn import functional as F

from mmgraft.model.loss import chunked_loss

HIDDEN = 576
SMALL, LARGE = 32_000, 151_936


def main() -> int:
    """Measure and print."""
    parser = options(__doc__, pairs=None)
    parser.add_argument("--positions", type=int, default=2048)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    peaks = {
        f"{way} {vocab}": in_child(_peak, way, vocab, chosen)["peak"]
        for way in ("chunks", "trained head", "full logits")
        for vocab in (SMALL, LARGE)
    }
    part = peaks[f"chunks {LARGE}"] / peaks[f"chunks {SMALL}"]
    full = peaks[f"chunks {LARGE}"] / peaks[f"full logits {LARGE}"]
    title = f"loss of {chosen.positions} positions, vocabulary {LARGE}: peak memory"
    measured = peaks[f"chunks {LARGE}"] / 1e6
    rows = [
        Row(
            title,
            f"vocabulary {SMALL}",
            f"{part:.2f}x ({measured:.0f} of {peaks[f'chunks {SMALL}'] / 1e6:.0f} MB)",
            "within 10 %",
            abs(part - 1) <= 0.1,
            {"ratio": part, "peaks": peaks},
        ),
        Row(
            title,
            "full logits",
            f"{full:.2f}x ({measured:.0f} of {peaks[f'full logits {LARGE}'] / 1e6:.0f} MB)",
            "no such tensor",
            full < 1,
            {"ratio": full},
        ),
    ]
    return show(chosen, rows)


def _peak(way: str, vocab: int, chosen: argparse.Namespace) -> dict[str, Any]:
    head = nn.Linear(HIDDEN, vocab, bias=False).requires_grad_(way == "trained head")
    hidden = torch.randn(chosen.positions, HIDDEN, requires_grad=True)
    targets = torch.randint(0, vocab, (chosen.positions,))
    with Peak() as peak:
        if way == "full logits":
            loss = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
        else:
            loss = chunked_loss(hidden, targets, head, vocab)
        loss.backward()
    return {"peak": peak.bytes}


if __name__ == "__main__":
    sys.exit(main())
