"""The rows of every stage, read and checked before anything is trained."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmgraft.data.batches.sampler import Part, mix
from mmgraft.data.chat.labels import answer_turns
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import resolve_template
from mmgraft.data.chat.turns import images_of_all
from mmgraft.data.formats.indexed import RowIndex, facts_of, select
from mmgraft.data.formats.layouts import Reading, Vqa
from mmgraft.data.formats.sources import Checks, Source, index_rows
from mmgraft.data.images import check_image
from mmgraft.data.rows import HUB, BadRow, OnBadRow, Row
from mmgraft.errors import UsageError
from mmgraft.progress import counted
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.recipes.recipe import DataEntry, Recipe
from mmgraft.recipes.source import recipe_dir


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
    """Return the recipe with paths that mean the same from any folder."""

    def moved(entries: Sequence[DataEntry] | None) -> list[DataEntry] | None:
        if entries is None:
            return None
        return [
            one.model_copy(update={"path": _absolute(one.path), "images": _absolute(one.images)})
            for one in entries
        ]

    stages = []
    for stage in recipe.stages:
        there = stage.template and Path(stage.template).expanduser().is_file()
        template = _absolute(stage.template) if there else stage.template  # or one of the base's
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
    """Return a set with whole paths wherever one is found; a packaged set has a name instead."""
    paths = {"path": spec.path, "images": spec.images, "train": spec.train}
    return spec.model_copy(
        update={
            key: _absolute(path)
            for key, path in paths.items()
            if path is not None and Path(path).expanduser().exists()
        }
    )


def _absolute(path: str | None) -> str | None:
    return path if path is None or path.startswith(HUB) else str(Path(path).expanduser().resolve())


def with_template(processor: GraftProcessor, template: str | None) -> GraftProcessor:
    """Return a processor with a stage's template; as it is where the stage names none."""
    if template is None:
        return processor
    return processor.with_template(resolve_template(template, processor.tokenizer))


def source_of(entry: DataEntry) -> Source:
    """Return the files of an entry that is set."""
    assert entry.path is not None
    path = entry.path if entry.path.startswith(HUB) else str(Path(entry.path).expanduser())
    reading = Reading(entry.format, {**entry.columns}, entry.vqa or Vqa())
    return Source(
        path, entry.images, reading, entry.limit, entry.split, entry.subset, entry.revision
    )


_PIECES = 64
#: Pieces by which rows are known again, and of these, how many may be others: rows are mended.
_MENDED = 8


def fingerprint(rows: Sequence[Row]) -> dict[str, Any]:
    """Describe rows so that a run that goes on can know them again, in their order."""
    facts = facts_of(rows)
    pieces = np.array_split(np.arange(len(rows)), min(_PIECES, len(rows)) or 1)
    hashes = [
        hashlib.blake2b(
            facts.characters[piece].tobytes() + facts.images[piece].tobytes(), digest_size=4
        ).hexdigest()
        for piece in pieces
    ]
    return {"rows": len(rows), "pieces": hashes}


def refuse_other_rows(rows: Sequence[Row], begun_with: Any, stage: str, run: Path) -> None:
    """Refuse to go on with other rows: what was shown already would not be known among them.

    A few rows may have been mended.

    Args:
        rows: Of the stage, as they are now.
        begun_with: Their ``fingerprint`` when the run was begun; None where it was not kept.
        stage: Its name.
        run: Named in the error.

    Raises:
        UsageError: There are more or fewer rows, or many say something else.
    """
    if not isinstance(begun_with, dict):
        return
    now = fingerprint(rows)
    other = sum(a != b for a, b in zip(now["pieces"], begun_with["pieces"], strict=False))
    if now["rows"] == begun_with["rows"] and other <= max(1, len(now["pieces"]) // _MENDED):
        return
    what = f"{now['rows']:,} rows" if now["rows"] != begun_with["rows"] else "other rows"
    raise UsageError(
        f"stage {stage!r} now has {what}, and the run was begun with {begun_with['rows']:,}: it "
        "would not go on at the row where it stopped; put the files back as they were, or begin "
        f"anew with: mmgraft train {run} --restart"
    )


#: Images whose two ends are looked at before a training.
_LOOKED_AT = 10_000
#: Rows that are read for each of these, because several may show one image.
_READ_FOR_EACH = 10


class StageData:
    """Reads files once, however many stages use them.

    Args:
        on_bad_row: "error" raises for a row that cannot be used, "skip" leaves it out.
        left_out: Keys of rows that an earlier session left out. Then these are left out again,
            mended or not, and an image that is missing now is found when its turn comes: the same
            rows stand in the same order as before.

    Attributes:
        bad: Rows that were left out, those of ``left_out`` not counted.
    """

    def __init__(
        self, on_bad_row: OnBadRow = "error", left_out: Collection[tuple[str, str]] | None = None
    ) -> None:
        self.on_bad_row = on_bad_row
        self.bad: list[BadRow] = []
        self._left_out = left_out
        self._read: dict[str, RowIndex] = {}

    def rows(
        self, entries: Sequence[DataEntry], seed: int, image_share: float | None = None
    ) -> RowIndex:
        """Return the mixture of some entries, the same for the same seed; see ``mix``.

        Raises:
            UsageError: A file or row that cannot be used.
        """
        parts = [Part(self._rows(source_of(entry)), entry.weight) for entry in entries]
        return mix(parts, seed, image_share=image_share)

    def _rows(self, source: Source) -> RowIndex:
        if (named := repr(source)) not in self._read:
            checks = Checks()
            if self.on_bad_row == "skip":
                checks = Checks(
                    images=self._left_out is None,
                    on_bad=self.bad.append,
                    leave_out=self._left_out or (),
                    accept=lambda row: answer_turns(row.messages, row.where),
                )
            self._read[named] = index_rows(source, checks)
        return self._read[named]


def check_rows(rows: Sequence[Row], stage: str, text_rows: str | None) -> int:
    """Count the rows that a stage leaves out because they have no image.

    Raises:
        UsageError: It would leave out all of them, or one that it keeps has no answer to learn.
    """
    facts = facts_of(rows)
    kept = facts.with_image if text_rows == "skip" else np.ones(len(rows), dtype=np.bool_)
    for at in np.flatnonzero(kept & ~facts.answers)[:1]:
        answer_turns(rows[int(at)].messages, rows[int(at)].where)
    if not kept.any() and len(rows):
        raise UsageError(
            f"stage {stage!r}: not one of {len(rows)} rows has an image, and text_rows: skip "
            "leaves such rows out, because they reach nothing that is trained; give image rows, or "
            "write text_rows: graft"
        )
    return len(rows) - int(kept.sum())


def check_images(rows: Sequence[Row], most: int = _LOOKED_AT) -> int:
    """Look at the two ends of the images of rows and return how many were looked at.

    Of more than ``most`` images an even sample is looked at, so that it takes seconds however many
    there are; the others are found when their turn comes, or by ``mmgraft data check``.

    Raises:
        UsageError: For one that is missing, no image, cut short or enormous, with its row.
    """
    facts = facts_of(rows)
    shown = np.flatnonzero(facts.with_image)
    shown = shown[:: -(-int(facts.images.sum(dtype=np.int64)) // (_READ_FOR_EACH * most)) or 1]
    found: dict[str, int] = {}  # the first row that shows an image
    for at, row in zip(shown.tolist(), select(rows, shown), strict=True):
        for image in images_of_all(row.messages):
            found.setdefault(str(image), at)
    images = sorted(found) if len(found) > most else list(found)
    looked = images[:: -(-len(images) // most) or 1]
    for name in counted("looking at images", looked):
        row = rows[found[name]]
        for image in images_of_all(row.messages):
            if str(image) == name:
                check_image(image, row.where)
                break
    return len(looked)
