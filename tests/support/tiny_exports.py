"""Grafts to export: on tiny bases and towers in folders, every tensor as if it were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmgraft.grafts.registry import get_method
from mmgraft.model.files.create import create_graft
from mmgraft.model.files.graft_file import GraftFile, TemplateChoice
from mmgraft.vision.projectors.configs import ProjectorConfig
from mmgraft.vision.spec import VisionSpec
from tiny import save_base, tiny_clip_dir, tiny_siglip_dir
from tiny_towers import picture

LAYERS = [0, 2, 3]
"""After a sliding and after full layers of the bases that have both; the last one too."""

ROUNDING = 1e-5
"""Bound of an export's difference of logits: 0, but where a processor rounds in another order."""

TOWERS = {"clip": tiny_clip_dir, "siglip": tiny_siglip_dir}


def make_base(folder: Path, arch: str, **values: Any) -> Path:
    """A base of its own in `folder/arch`, made once."""
    base = folder / arch
    return base if base.is_dir() else save_base(base, arch, **values)


def make_tower(folder: Path, name: str) -> Path:
    """A CLIP or SigLIP tower of 4 patches in `folder/name`, made once."""
    tower = folder / name
    return tower if tower.is_dir() else TOWERS[name](tower)


def make_graft(
    folder: Path,
    arch: str = "llama",
    tower: str | VisionSpec = "clip",
    method: str = "iaa",
    name: str = "run",
    projector: ProjectorConfig | None = None,
    template: TemplateChoice | None = None,
    base: Path | None = None,
    **config: Any,
) -> Path:
    """A graft in `folder/name`, its tensors moved away from where they start."""
    if method == "iaa":
        config = {"layers": LAYERS, **config}
    if method == "lora":
        config = {"rank": 8, **config}
    settings = get_method(method).config_class.model_validate(config)
    spec = VisionSpec(id=str(make_tower(folder, tower))) if isinstance(tower, str) else tower
    run = folder / name
    torch.manual_seed(1)
    place = base or make_base(folder, arch)
    create_graft(str(place), spec, settings, run, projector=projector, template=template)
    path = run / "graft.safetensors"
    generator = torch.Generator().manual_seed(2)
    tensors = {
        key: value + 0.1 * torch.randn(value.shape, generator=generator)
        for key, value in load_file(path).items()
    }
    save_file(tensors, path)
    return run


def change_record(run: Path, **values: Any) -> None:
    """Change fields of a graft's record."""
    record = GraftFile.read(run).model_copy(update=values)
    (run / "graft_config.json").write_text(record.dump())


def save_pictures(folder: Path) -> list[str]:
    """Three pictures of different shapes, as PNG files."""
    made = [picture(40, 30), picture(24, 50, 1), Image.new("RGB", (17, 17), (200, 30, 90))]
    paths = [str(folder / f"picture{number}.png") for number in range(3)]
    for path, image in zip(paths, made, strict=True):
        image.save(path)
    return paths


def conversations(paths: list[str]) -> list[list[dict[str, Any]]]:
    """One picture; two pictures in two turns, text between them; none."""
    first, second, third = ({"type": "image", "image": path} for path in paths)
    return [
        [{"role": "user", "content": [first, {"type": "text", "text": "What colour is it?"}]}],
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Look: "}, second]},
            {"role": "assistant", "content": "A square."},
            {"role": "user", "content": [{"type": "text", "text": "And this"}, third]},
        ],
        [{"role": "user", "content": "One, two, three: what comes next?"}],
    ]
