"""The rows of every stage, read and checked before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mmgraft.data.bad_rows import BadRow, OnBadRow
from mmgraft.data.content import images_of_all
from mmgraft.data.images import check_image
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


_LOOKED_AT = 10_000
"""Picture files whose two ends are looked at before a training."""


class StageData:
    """Reads files once, however many stages use them.

    Args:
        on_bad_row: "error" raises for a row that cannot be used, "skip" leaves it out.
        left_out: Keys of rows that an earlier sitting left out. Then these are left out again,
            mended or not, and a picture that is missing now is found when its turn comes: the same
            rows stand in the same order as before.

    Attributes:
        bad: Rows that were left out, those of `left_out` not counted.
    """

    def __init__(
        self,
        on_bad_row: OnBadRow = "error",
        left_out: Collection[tuple[str, str]] | None = None,
    ) -> None:
        self.on_bad_row = on_bad_row
        self.bad: list[BadRow] = []
        self._left_out = left_out
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
            given = (entry.path, entry.images, entry.format, entry.limit)
            if self.on_bad_row == "error":
                self._read[key] = read_rows(*given)
            else:
                self._read[key] = read_rows(
                    *given,
                    check_images=self._left_out is None,
                    on_bad=self.bad.append,
                    leave_out=self._left_out or (),
                    accept=lambda row: answer_turns(row.messages, row.where),
                )
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


def check_pictures(rows: Sequence[Row], most: int = _LOOKED_AT) -> int:
    """Look at the two ends of the pictures of rows; gives the number of files looked at.

    Of more than `most` files an even sample is looked at, so that it takes seconds however many
    there are; the others are found when their turn comes, or by ``mmgraft data check``.

    Raises:
        UsageError: For one that is missing, no picture, cut short or enormous, with its row.
    """
    found: dict[str, Row] = {}
    for row in rows:
        for image in images_of_all(row.messages):
            found.setdefault(str(image), row)
    images = sorted(found) if len(found) > most else list(found)
    looked = images[:: -(-len(images) // most) or 1]
    for image in looked:
        check_image(image, found[image].where)
    return len(looked)
