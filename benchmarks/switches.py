"""Measure each switch of a recipe, one at a time: peak memory and processor time of steps.

    python benchmarks/switches.py [--only gradient_checkpointing] [--layers 6] [--pairs 1] [--json]

The base has SmolLM2's shape, cut to `--layers`, in bf16; the tower is a ViT-B/16 that sees 144
patches; IAA inserts two layers. Four rows of about 240 positions are a step. Each switch is trained
in turn with the recipe without it. Packing, grouping, attention and compile: `batching_rows.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pairs import Row, in_child, options, ratio, show

SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gradient_checkpointing: true": ({"gradient_checkpointing": True}, {}),
    "batch_size: 1, accumulate: 4": ({"batch_size": 1, "accumulate": 4}, {}),
    "max_length: 192": ({"max_length": 192}, {}),
    "optimizer: adamw_8bit": ({"optimizer": "adamw_8bit"}, {}),
    "precision: bf16": ({}, {"precision": "fp32"}),
    "quantization: nf4": ({"quantization": "nf4"}, {}),
    "feature_cache: true": ({"feature_cache": True}, {}),
    "workers: 1": ({"workers": 1}, {}),
}
"""A switch: what the recipe with it says, and the one it is compared with."""


def main() -> int:
    """Measure every switch and print."""
    given = _options()
    import torch
    import trainings

    trainings.import_everything()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = in_child(_make, folder, given)
        if "error" in made:
            raise SystemExit(made["error"])
        torch.set_num_threads(given.threads)
        stage = {"train": ["projector", "graft"], "batch_size": 4, "max_steps": given.steps}
        plain = trainings.recipe(folder / "rows.jsonl", "iaa", stage)
        peaks: dict[str, int] = {}
        found = [
            _measure(switch, folder / "run", plain, given, peaks)
            for switch in SWITCHES
            if not given.only or any(word in switch for word in given.only)
        ]
    return show(given, found)


def _options() -> argparse.Namespace:
    parser = options(__doc__, pairs=1)
    parser.add_argument("--only", action="append", help="part of a switch; may be repeated")
    parser.add_argument("--layers", type=int, default=6, help="of the base")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--base", type=Path, help="folder of a base, instead of a random one")
    return parser.parse_args()


def _make(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    import torch
    from folders import SMOLLM2, write_base, write_rows, write_tower
    from trainings import make_run

    from mmgraft import IAAConfig

    shape = {**SMOLLM2, "num_hidden_layers": given.layers}
    base = given.base or write_base(folder / "base", shape, torch.bfloat16)
    tower = write_tower(folder / "tower", torch.bfloat16, image_size=192)
    write_rows(folder, 4 * given.steps, side=448, answer=128)
    config = IAAConfig(layers="last:2", embedding=False, head=False)
    return make_run(folder / "run", base, tower, config)


def _measure(
    switch: str,
    run: Path,
    plain: dict[str, Any],
    given: argparse.Namespace,
    known: dict[str, int],
) -> Row:
    from trainings import changed

    ours, theirs = (changed(plain, **settings) for settings in SWITCHES[switch])
    peaks = [_peak(run, one, known) for one in (ours, theirs)]
    seconds: list[tuple[float, float]] = []
    for number in range(given.pairs):
        order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        took = [statistics.median(_train(run, one, False)["steps"][0]) for one in order]
        seconds.append((took[0], took[1]) if number % 2 == 0 else (took[1], took[0]))
    spent = ratio([a / b for a, b in seconds])
    against = SWITCHES[switch][1]
    return Row(
        f"`{switch}`",
        ", ".join(f"`{key}: {value}`" for key, value in against.items()) or "without it",
        f"peak {peaks[0] / 1e6:.0f} MB of {peaks[1] / 1e6:.0f} MB; step {spent.median:.2f}x "
        f"({statistics.median(a for a, _ in seconds):.2f} s)",
        "reported",
        None,
        {"peaks": peaks, "seconds": seconds},
    )


def _peak(run: Path, settings: dict[str, Any], known: dict[str, int]) -> int:
    """The peak of a training of two steps: the second has the optimizer's state beside it."""
    from trainings import changed

    short = changed(settings, max_steps=2)
    key = json.dumps(short, sort_keys=True)
    if key not in known:
        known[key] = _train(run, short, True)["peak"]
    return known[key]


def _train(run: Path, settings: dict[str, Any], memory: bool) -> dict[str, Any]:
    from trainings import train

    answer = in_child(train, run, settings, memory)
    if "error" in answer:
        raise SystemExit(answer["error"])
    return answer


if __name__ == "__main__":
    sys.exit(main())
