"""The graft that is to be trained, as configs describe it: a run's, or one of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from mmgraft.aliases import resolve_alias
from mmgraft.basefiles import ModelFiles, load_config
from mmgraft.errors import UsageError
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.graft_file import OWN_BASE, BaseReference, GraftFile, ImageToken
from mmgraft.model.files.load import local_tower
from mmgraft.model.files.summary import locate
from mmgraft.recipes.recipe import Recipe
from mmgraft.vision.plan import ImagePositions, Plan, Size
from mmgraft.vision.spec import TRANSFORMERS_KIND, VisionSpec
from mmgraft.vision.towers.base import VisionTower
from mmgraft.vision.towers.registry import TowerShape, describe_tower, load_tower


@dataclass(frozen=True)
class Subject:
    """A graft, its base and its tower, without weights.

    Attributes:
        record: The graft's.
        files: The base's, of which config and tokenizer are read.
        config: The base's.
        vision: The tower's spec, its path that of this machine.
        shape: The tower's width and plan.
    """

    record: GraftFile
    files: ModelFiles
    config: PreTrainedConfig
    vision: VisionSpec
    shape: TowerShape

    @property
    def positions(self) -> ImagePositions:
        """Positions of an image."""
        return self.record.positions(self.shape)

    def plan(self, size: Size | None) -> Plan:
        """Return the plan of an image of a size; of every image where the size is None."""
        plan = self.shape.plan
        if isinstance(plan, Plan):
            return plan
        assert size is not None
        return plan(size)

    @cached_property
    def tower(self) -> VisionTower:
        """Build the tower without weights; one of a registered kind has no config and is loaded."""
        if self.vision.kind != TRANSFORMERS_KIND:
            return load_tower(self.vision)
        from mmgraft.vision.towers.transformers import outline

        return outline(self.vision)


def subject_of_run(run: Path, base: str | None = None, vision: str | None = None) -> Subject:
    """Describe the graft in a folder, on its own base and tower or on others.

    Raises:
        UsageError: No graft there, or no such base or tower.
    """
    record = GraftFile.read(run)
    if base is None and record.base.id.startswith(f"./{OWN_BASE}"):
        files = ModelFiles(record.base.id, (run / record.base.id).resolve())
    else:
        revision = record.base.revision if base is None else None
        files = _base(resolve_alias(base) if base else record.base.id, revision)
    spec = VisionSpec.from_name(vision) if vision else local_tower(record, run)
    return _subject(record, files, spec)


def subject_of_recipe(
    recipe: Recipe, base: str | None = None, vision: str | None = None
) -> Subject:
    """Describe the graft that ``mmgraft graft --recipe`` would make.

    Raises:
        UsageError: The recipe names no base and none is given, or settings that do not fit.
    """
    name = base or recipe.graft.base
    if name is None:
        raise UsageError(
            f"the recipe {recipe.name} names no base: give --base, such as --base qwen2-7b"
        )
    spec = recipe.graft.tower(vision)
    record = GraftFile(
        method=recipe.method,
        config=_method_config(recipe),
        workflow=recipe.workflow or "mm",
        base=BaseReference(id=name),
        vision=spec,
        projector=recipe.graft.projector,
        image_token=ImageToken(id=0),
    )
    return _subject(record, _base(resolve_alias(name), None), spec)


def _method_config(recipe: Recipe) -> dict[str, Any]:
    kind = get_method(recipe.method).config_class
    try:
        return kind.parse(dict(recipe.graft.config), "graft.config").model_dump(mode="json")
    except UsageError as error:
        raise UsageError(
            f"{error}; set it in the recipe, or here with --set graft.config.KEY=VALUE, such as "
            "--set graft.config.layers=last:2"
        ) from None


def _base(name: str, revision: str | None) -> ModelFiles:
    folder = Path(name).expanduser().absolute()
    if (folder / "config.json").is_file() and not (folder / "graft_config.json").is_file():
        return ModelFiles(str(folder), folder)  # with weights or without
    found = locate(name, revision)
    if isinstance(found, Path):
        raise UsageError(f"{name} is a graft, not a base; name a model with --base")
    return found


def _subject(record: GraftFile, files: ModelFiles, spec: VisionSpec) -> Subject:
    shape = describe_tower(spec)
    config = load_config(files)
    vars(config).pop("quantization_config", None)
    return Subject(record, files, config, spec, shape)


def loaded_dtype(recipe: Recipe) -> torch.dtype:
    """Return the base's dtype in training: fp32 where it is trained or computed in fp32."""
    whole = recipe.base == "full" or any(stage.precision == "fp32" for stage in recipe.stages)
    return torch.float32 if whole else torch.bfloat16
