"""`mmgraft graft` on a large sharded base, against a copy of the same tensors with safetensors.

    python benchmarks/graft_large.py [--base FOLDER] [--layers 9,19] [--pairs 5] [--json]

Without `--base` a Llama of 2.03 billion random parameters in bf16 is written first (4 GB on disk,
where `--folder` says, else the temporary folder) and removed afterwards. Both write the same
tensors to the same disk and wait until they are there; the copy reads tensor by tensor with
`safe_open` and writes one file with `save_file`. Time is the wall clock after imports. Memory is
the peak of a process above what its imports take.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pairs import Peak, Row, alternate, in_child, options, show

TIME, ABOVE = 1.5, 200e6


def main() -> int:
    """Measure time and memory, and print a row for each."""
    given = _options()
    import torch
    from folders import TWO_BILLION, write_base, write_tower

    _import_everything()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        tower = write_tower(folder / "tower", torch.bfloat16, num_hidden_layers=2)
        base = given.base or folder / "base"
        if given.base is None:
            in_child(lambda: {"base": str(write_base(base, TWO_BILLION, torch.bfloat16))})
        layers = [int(layer) for layer in given.layers.split(",")]
        names = _copied(base, layers)

        def ours() -> None:
            _graft(base, tower, layers, folder / "run")

        def theirs() -> None:
            _copy(base, names, folder / "copy.safetensors")

        spent = in_child(lambda: _times(ours, theirs, given.pairs))
        memory = in_child(lambda: _peak(ours))
        copying = in_child(lambda: _peak(theirs))
        ours()
        written = sum(path.stat().st_size for path in (folder / "run").glob("*.safetensors"))
    for answer in (spent, memory, copying):
        if "error" in answer:
            raise SystemExit(answer["error"])
    above = memory["peak"] - written
    rows = [
        Row(
            f"`mmgraft graft`, {sum(_sizes(base).values()) / 1e9 if given.base else 2.03:.2f} B "
            f"parameters, {len(layers)} layers, embedding and head: time after imports",
            "a copy of the same tensors",
            f"{spent['ratio']:.2f}x ({spent['ours']:.2f} s against {spent['theirs']:.2f} s)",
            f"at most {TIME}x",
            spent["ratio"] <= TIME,
            spent,
        ),
        Row(
            "the same: peak memory above imports and copied tensors",
            f"{written / 1e6:.0f} MB of tensors",
            f"{above / 1e6:.0f} MB (the copy itself: {(copying['peak'] - written) / 1e6:.0f} MB)",
            f"at most {ABOVE / 1e6:.0f} MB",
            above <= ABOVE,
            {"peak": memory["peak"], "imports": memory["imports"], "written": written},
        ),
    ]
    return show(given, rows)


def _options() -> argparse.Namespace:
    parser = options(__doc__, pairs=5)
    parser.add_argument("--base", type=Path, help="folder of a base, instead of a random one")
    parser.add_argument("--layers", default="9,19", help="after which layers one is inserted")
    parser.add_argument("--folder", type=Path, help="where the files go")
    return parser.parse_args()


def _import_everything() -> None:
    import transformers.models.clip.modeling_clip
    import transformers.models.llama.modeling_llama  # noqa: F401

    import mmgraft.model.files.create
    import mmgraft.vision.towers.transformers  # noqa: F401


def _graft(base: Path, tower: Path, layers: list[int], folder: Path) -> None:
    from mmgraft import IAAConfig
    from mmgraft.model.files.create import create_graft
    from mmgraft.vision.spec import VisionSpec

    shutil.rmtree(folder, ignore_errors=True)
    create_graft(str(base), VisionSpec(id=str(tower)), IAAConfig(layers=layers), folder)


def _sizes(base: Path) -> dict[str, int]:
    from mmgraft.basefiles import TensorReader, resolve

    with TensorReader(resolve(str(base))) as reader:
        return {name: _product(reader.shape(name)) for name in reader}


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _copied(base: Path, layers: list[int]) -> list[str]:
    """The tensors of the base that an IAA graft with these layers copies."""
    wanted = tuple(f"model.layers.{index}." for index in layers)
    whole = ("model.embed_tokens.", "model.norm.", "lm_head.")
    return [name for name in _sizes(base) if name.startswith((*wanted, *whole))]


def _copy(base: Path, names: list[str], file: Path) -> None:
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    index = base / "model.safetensors.index.json"
    where = dict.fromkeys(names, "model.safetensors")
    if index.is_file():
        where = json.loads(index.read_text())["weight_map"]
    tensors = {}
    for shard in sorted({where[name] for name in names}):
        with safe_open(base / shard, framework="pt") as opened:
            chosen = [name for name in names if where[name] == shard]
            tensors.update({name: opened.get_tensor(name) for name in chosen})
    file.unlink(missing_ok=True)
    save_file(tensors, file)
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _times(ours: Any, theirs: Any, pairs: int) -> dict[str, Any]:
    found = alternate(ours, theirs, pairs=pairs, clock=time.perf_counter)
    mine, other = found.seconds
    ratio = statistics.median(a / b for a, b in zip(found.ours, found.theirs, strict=True))
    return {"ratio": ratio, "ours": mine, "theirs": other, "all": [found.ours, found.theirs]}


def _peak(work: Any) -> dict[str, Any]:
    with Peak() as peak:
        work()
    return {"peak": peak.bytes, "imports": peak.before}


if __name__ == "__main__":
    sys.exit(main())
