"""A base in 4-bit (nf4, double quantisation) against one in bf16: weights, and a training step.

    python benchmarks/four_bit.py [--layers 30] [--pairs 1] [--base FOLDER] [--json]

The base has SmolLM2's shape. Weights are those of the linear layers inside the decoder layers, with
all that is kept of their quantisation; embedding and head stay as they are. Trained are projector
and two inserted layers of IAA, on rows of about 240 positions, two a step, by `mmgraft train`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pairs import Row, in_child, options, ratio, show

LIMIT = 0.3


def main() -> int:
    """Measure both and print."""
    given = _options()
    import torch
    import trainings

    trainings.import_everything()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answer = in_child(_make, folder, given)
        base = given.base or folder / "base"
        sizes = [in_child(_weights, base, kind) for kind in ("nf4", None)]
        stage = {"train": ["projector", "graft"], "batch_size": 2, "max_steps": 3}
        plain = trainings.recipe(folder / "rows.jsonl", "iaa", stage)
        both = [trainings.changed(plain, quantization="nf4"), plain]
        run = folder / "run"
        measured = [in_child(trainings.train, run, one, True) for one in both]
        turns = []
        for number in range(given.pairs):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            took = {at: in_child(trainings.train, run, both[at], False) for at in order}
            turns.append((took[0], took[1]))
    for one in (answer, *sizes, *measured, *(each for turn in turns for each in turn)):
        if "error" in one:
            raise SystemExit(one["error"])
    seconds = [[statistics.median(one["steps"][0]) for one in turn] for turn in turns]
    share = sizes[0]["bytes"] / sizes[1]["bytes"]
    spent = ratio([a / b for a, b in seconds])
    peaks, loading = ([one[key] for one in measured] for key in ("peak", "loading"))
    rows = [
        Row(
            "4-bit base: its linear weights",
            "in bf16",
            f"{share:.3f}x ({sizes[0]['bytes'] / 1e6:.0f} MB of {sizes[1]['bytes'] / 1e6:.0f} MB)",
            f"at most {LIMIT}x",
            share <= LIMIT,
        ),
        Row(
            "4-bit base: peak memory of training steps, with all weights",
            "in bf16",
            f"{peaks[0] / peaks[1]:.2f}x ({peaks[0] / 1e6:.0f} MB of {peaks[1] / 1e6:.0f} MB; "
            f"while loading {loading[0] / 1e6:.0f} and {loading[1] / 1e6:.0f} MB)",
            "reported",
            None,
        ),
        Row(
            "4-bit base: time of a step",
            "in bf16",
            f"{spent.median:.2f}x ({statistics.median(a for a, _ in seconds):.1f} s against "
            f"{statistics.median(b for _, b in seconds):.1f} s)",
            "reported",
            None,
            {"seconds": seconds},
        ),
    ]
    return show(given, rows)


def _options() -> argparse.Namespace:
    parser = options(__doc__, pairs=1)
    parser.add_argument("--layers", type=int, default=30, help="of the base")
    parser.add_argument("--base", type=Path, help="folder of a base, instead of a random one")
    return parser.parse_args()


def _make(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    import torch
    from folders import SMOLLM2, write_base, write_rows, write_tower
    from trainings import make_run

    from mmgraft import IAAConfig

    shape = {**SMOLLM2, "num_hidden_layers": given.layers}
    base = given.base or write_base(folder / "base", shape, torch.bfloat16)
    tower = write_tower(folder / "tower", torch.bfloat16, image_size=192, num_hidden_layers=2)
    write_rows(folder, 6, side=192, answer=128)
    config = IAAConfig(layers="last:2", embedding=False, head=False)
    return make_run(folder / "run", base, tower, config)


def _weights(base: Path, kind: str | None) -> dict[str, Any]:
    """Bytes of the linear layers inside the decoder layers."""
    import torch

    from mmgraft.anatomy import decoder_layers, examine
    from mmgraft.basefiles import resolve
    from mmgraft.model.files.load import load_base

    device_map = {"": "cpu"} if kind else None
    model = load_base(resolve(str(base)), torch.bfloat16, device_map, kind)
    total = 0
    for module in decoder_layers(model, examine(model)).modules():
        if isinstance(module, torch.nn.Linear):
            total += sum(tensor.nbytes for tensor in _kept(module))
    return {"bytes": total}


def _kept(module: Any) -> list[Any]:
    """The tensors that a layer keeps: of a packed one its numbers, scales and their scales."""
    import torch

    state = getattr(module.weight, "quant_state", None)
    held = [module.weight.data, *([] if module.bias is None else [module.bias])]
    for part in (state, getattr(state, "state2", None)):
        for name in ("absmax", "code", "offset"):
            value = getattr(part, name, None)
            # The code book is one tensor for all layers.
            if isinstance(value, torch.Tensor) and name != "code":
                held.append(value)
    return held


if __name__ == "__main__":
    sys.exit(main())
