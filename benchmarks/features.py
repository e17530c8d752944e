"""`feature_cache: true`: what the frozen tower costs in the first epoch, and later.

    python benchmarks/features.py [--rows 24] [--layers 2] [--base FOLDER] [--json]

Two stages over the same rows: a projector for two epochs, then the graft (IAA, one layer) for one.
It is trained with and without the cache, each in a process of its own. The tower is a ViT-B/16 that
sees 576 patches, the base has SmolLM2's shape, cut to `--layers`. Time is processor time, from the
stage's beginning to the end of its first epoch, and from one epoch's end to the next one's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pairs import Row, in_child, options, show

EPOCHS = ("first epoch", "second epoch", "later stage")


def main() -> int:
    """Train twice and print a row for each epoch."""
    given = _options()
    import torch
    import trainings

    trainings.import_everything()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = in_child(_make, folder, given)
        if "error" in made:
            raise SystemExit(made["error"])
        usual = {"batch_size": 4}
        plain = trainings.recipe(
            folder / "rows.jsonl",
            "iaa",
            {**usual, "train": ["projector"], "graft_active": False, "epochs": 2},
            {**usual, "train": ["projector", "graft"], "epochs": 1},
        )
        cached = trainings.changed(plain, feature_cache=True)
        answers = [in_child(_counted, folder / "run", one) for one in (cached, plain)]
    for answer in answers:
        if "error" in answer:
            raise SystemExit(answer["error"])
    with_cache, without = answers
    rows = [
        Row(
            f"`feature_cache: true`, {EPOCHS[at]}",
            "the same without it",
            f"{with_cache['seconds'][at]:.1f} s, of it {with_cache['tower'][at]:.1f} s tower, "
            f"against {without['seconds'][at]:.1f} s, of it {without['tower'][at]:.1f} s tower",
            "reported" if at == 0 else "no tower",
            None if at == 0 else with_cache["images"][at] == 0,
            {"with": with_cache, "without": without},
        )
        for at in range(len(EPOCHS))
    ]
    return show(given, rows)


def _options() -> argparse.Namespace:
    parser = options(__doc__, pairs=None)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--layers", type=int, default=2, help="of the base")
    parser.add_argument("--base", type=Path, help="folder of a base, instead of a random one")
    return parser.parse_args()


def _make(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    import torch
    from folders import SMOLLM2, write_base, write_rows, write_tower
    from trainings import make_run

    from mmgraft import IAAConfig

    shape = {**SMOLLM2, "num_hidden_layers": given.layers}
    base = given.base or write_base(folder / "base", shape, torch.bfloat16)
    tower = write_tower(folder / "tower", torch.bfloat16)
    write_rows(folder, given.rows)
    return make_run(
        folder / "run", base, tower, IAAConfig(layers="last:1", embedding=False, head=False)
    )


def _counted(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train; gives seconds, seconds in the tower and images that it saw, for each of `EPOCHS`."""
    import trainings

    from mmgraft.vision.towers.transformers import TransformersTower

    forward = TransformersTower.forward
    calls: list[tuple[float, float, int]] = []  # when it began, seconds, images

    def counted(self: Any, pixel_values: Any) -> Any:
        start = time.process_time()
        out = forward(self, pixel_values)
        calls.append((start, time.process_time() - start, len(pixel_values)))
        return out

    TransformersTower.forward = counted  # type: ignore[method-assign]
    marks = trainings.train(run, settings, memory=False)["marks"]
    spans = [*zip(marks[0], marks[0][1:], strict=False), (marks[1][0], marks[1][1])]
    inside = [[call for call in calls if start <= call[0] < end] for start, end in spans]
    return {
        "seconds": [end - start for start, end in spans],
        "tower": [sum(call[1] for call in each) for each in inside],
        "images": [sum(call[2] for call in each) for each in inside],
    }


if __name__ == "__main__":
    sys.exit(main())
