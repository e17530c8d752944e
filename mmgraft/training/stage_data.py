"""The rows of every stage, read and checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmgraft.data.masking import answer_turns
from mmgraft.data.mixture import Part, mix
from mmgraft.data.rows import Row
from mmgraft.data.sources import read_rows
from mmgraft.errors import UsageError
from mmgraft.evaluation.set_spec import SetSpec
from mmgraft.recipe_files import recipe_dir
from mmgraft.training.recipe import DataEntry, Recipe


def check_data_is_set(recipe: Recipe, run: Path, recipe_file: Path) -> None:
    """Say exactly what to set where a recipe has no data yet.

    Raises:
        UsageError: Names the keys, the file they are in, and the command that gives data instead.
    """
    missing = list(recipe.data_to_set())
    if not missing:
        return
    keys = ", ".join(f"`{key}`" for key in missing)
    place = str(recipe_file)
    if recipe_file.parent == recipe_dir():
        place = f"a copy of it (mmgraft recipes cp {recipe.name} {run / 'recipe.yaml'})"
    names = [stage.name for stage in recipe.stages]
    per_stage = ""
    if len(missing) > 1:
        each = " ".join(f"--data {name}=FILE" for name in names)
        per_stage = f"\nor, with other rows for each stage: mmgraft train {run} {each} --images DIR"
    raise UsageError(
        f"the recipe has no data yet: set {keys} in {place}, to a LLaVA json or a "
        f"messages jsonl,\nor run: mmgraft train {run} --data FILE --images DIR{per_stage}"
    )


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with paths that mean the same from any folder."""

    def moved(entries: Sequence[DataEntry] | None) -> list[DataEntry] | None:
        if entries is None:
            return None
        return [
            entry.model_copy(
                update={
                    "path": _absolute(entry.path),
                    "images": _absolute(entry.images),
                }
            )
            for entry in entries
        ]

    stages = []
    for stage in recipe.stages:
        named = stage.template in (None, "chat", "plain")
        template = stage.template if named else _absolute(stage.template)
        stages.append(stage.model_copy(update={"data": moved(stage.data), "template": template}))
    cache = recipe.feature_cache
    update: dict[str, Any] = {
        "stages": stages,
        "data": moved(recipe.data),
        "eval_data": moved(recipe.eval_data),
        "feature_cache": _absolute(cache) if isinstance(cache, str) else cache,
        "evaluation": [_whole_paths(one) for one in recipe.evaluation],
    }
    return recipe.model_copy(update=update)


def _whole_paths(spec: SetSpec) -> SetSpec:
    """A set with whole paths wherever one is found; a packaged set has a name instead."""
    paths = {"path": spec.path, "images": spec.images, "train": spec.train}
    return spec.model_copy(
        update={
            key: _absolute(path)
            for key, path in paths.items()
            if path is not None and Path(path).expanduser().exists()
        }
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


class StageData:
    """Reads files once, however many stages use them."""

    def __init__(self) -> None:
        self._read: dict[tuple[Any, ...], list[Row]] = {}

    def rows(self, entries: Sequence[DataEntry], seed: int) -> list[Row]:
        """The mixture of some entries, the same for the same seed.

        Raises:
            UsageError: A file or row that cannot be used.
        """
        return mix([Part(self._rows(entry), entry.weight) for entry in entries], seed)

    def _rows(self, entry: DataEntry) -> list[Row]:
        assert entry.path is not None
        key = (entry.path, entry.images, entry.format, entry.limit)
        if key not in self._read:
            self._read[key] = read_rows(entry.path, entry.images, entry.format, entry.limit)
        return self._read[key]


def check_rows(rows: Sequence[Row], stage: str, text_rows: str | None) -> int:
    """The number of rows that a stage leaves out because they have no image.

    Raises:
        UsageError: It would leave out all of them, or one that it keeps has no answer to learn.
    """
    skips = text_rows == "skip"
    for row in rows:
        if row.has_image or not skips:
            answer_turns(row.messages, row.where)
    if not skips:
        return 0
    without = sum(not row.has_image for row in rows)
    if without == len(rows):
        raise UsageError(
            f"stage {stage!r}: not one of {len(rows)} rows has an image, and text_rows: skip "
            "leaves such rows out, for they reach nothing that is trained; give image rows, or "
            "write text_rows: graft"
        )
    return without
