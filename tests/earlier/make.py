"""Make the kept grafts: by the code of commit 8074945, the last before the rebuild.

`python tests/earlier/make.py` made them once. It is kept to be read: made again by later code they
would be later grafts. A new kind is added beside them, never in their place.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # this checkout's code, whatever is installed

import conftest  # noqa: E402, F401  (what it sets must be set before torch is loaded)

_SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_STAGE = {"name": "align", "train": ["projector", "base"], "lr": 1e-3, "max_steps": 2,
          "text_rows": "base"}  # fmt: skip
_PARTS = ("base", "tower", "late", "images")


def main() -> None:
    """Make all of them in one folder, note what they give, and keep them."""
    from earlier import kinds
    from unchanged import comparing, conditions, stopped, training
    from unchanged.parts import command

    with tempfile.TemporaryDirectory() as name:
        here = Path(name).resolve()
        _make_parts(here)
        for graft, options in kinds.GRAFTS.items():
            _graft(here, graft, options)
            _move_tensors(here / graft / "graft.safetensors")
        _make_official(here, kinds.OFFICIAL)
        _make_trained_base(here, kinds.TRAINED_BASE)
        command("export", here / "iaa-c", "--to", "full", "--out", here / kinds.FULL)
        run = _graft(here, kinds.STOPPED, [*kinds.GRAFTS["wings"], "--layers", "0,2"])
        stopped.train_until_it_stops(run, here, "wings", keep_checkpoints=1)
        kinds.pack(here, [*_PARTS, *kinds.LOADED])
        for file in ("rows.jsonl", "llava.json"):
            (kinds.KEPT / file).write_bytes((here / file).read_bytes())
    with tempfile.TemporaryDirectory() as name:
        here = kinds.unpack(Path(name).resolve())
        found = {"made_with": conditions.present(), "logits": _logits(here)}
        with conditions.one_thread():
            stopped.go_on(here / kinds.STOPPED)
        found["resumed"] = training.outcome(here / kinds.STOPPED)
    (kinds.KEPT / "expected.json").write_text(comparing.dump(found), encoding="utf-8")


def _make_parts(here: Path) -> None:
    from tiny import save_base
    from tiny_towers import save_tower
    from unchanged.parts import make_rows

    save_base(here / "base", "llama", **_SIZES)
    save_tower(here / "tower", "clip", image_size=16, hidden_size=8, intermediate_size=12)
    make_rows(here)


def _graft(here: Path, name: str, options: list[str]) -> Path:
    from unchanged.parts import command

    vision = ["--vision", here / "tower", "--feature-layer", "-2"]
    command("graft", here / "base", *vision, *options, "--out", here / name)
    return here / name


def _move_tensors(file: Path) -> None:
    """Put noise on what a fresh graft starts with: a gate is closed, a learner adds nothing."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(5)
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
        metadata = opened.metadata()
    moved = {name: one + 0.1 * torch.randn(one.shape, generator=draw)
             for name, one in tensors.items()}  # fmt: skip
    save_file(moved, file, metadata=metadata)


def _make_official(here: Path, name: str) -> None:
    """A checkpoint as the published code writes it, imported onto its base."""
    from published import published_wings, save_published
    from unchanged.parts import command

    tensors, config = published_wings(here / "base", here / "tower")
    tensors = {key: one for key, one in tensors.items() if "vision_tower" not in key}
    checkpoint = save_published(here / "published", tensors, config)
    options = ["--base", here / "base", "--tower", here / "tower"]
    command("import", checkpoint, "--out", here / name, *options)


def _make_trained_base(here: Path, name: str) -> None:
    """A run whose base was trained; what the base said before is left out, for its size."""
    from earlier import kinds
    from unchanged.parts import command, write_recipe

    run = _graft(here, name, kinds.GRAFTS["llava"])
    write_recipe(run, here, "llava", [_STAGE], base="full")
    command("train", run, "--device", "cpu")
    (run / "text-before.safetensors").unlink()


def _logits(here: Path) -> dict[str, object]:
    from earlier import kinds
    from mmgraft import GraftedModel

    return {name: kinds.logits(GraftedModel.from_pretrained(here / name)) for name in kinds.LOADED}


if __name__ == "__main__":
    main()
