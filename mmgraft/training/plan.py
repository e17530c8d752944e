"""A training that was checked, and the recipes in the folder of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmgraft.data.rows import BadRow, Row
from mmgraft.errors import UsageError
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.recipes.source import find_recipe, method_recipe
from mmgraft.training.distributed.parallel import processes

#: Recipe that ``mmgraft graft`` writes into a run, for its owner to change.
RECIPE = "recipe.yaml"
#: The recipe that the run is trained by, every setting resolved; ``--resume`` goes on with it.
USED_RECIPE = "recipe.used.yaml"


@dataclass
class Plan:
    """A training that has been checked and can begin."""

    run: Path
    record: GraftFile
    recipe: Recipe  # resolved
    device: str
    rows: list[Sequence[Row]] = field(default_factory=list)  # by stage
    skipped: list[int] = field(default_factory=list)  # rows without an image, by stage
    eval_rows: Sequence[Row] = ()
    bad: list[BadRow] = field(default_factory=list)  # left out, and in no log yet
    first: int = 0
    resume: bool = False

    @property
    def in_pieces(self) -> bool:
        """Return whether several processes hold the model in pieces that mmgraft makes."""
        return self.recipe.parallel == "fsdp2" and processes() > 1

    @property
    def stages(self) -> list[Stage]:
        """All stages of the recipe."""
        return self.recipe.stages


def recipe_file(run: Path, record: GraftFile, named: str | Path | None) -> Path:
    """Find the recipe of a run: the one that is named, else its own, else its method's."""
    if named is not None:
        return find_recipe(named)
    if (run / RECIPE).is_file():
        return run / RECIPE
    default = method_recipe(get_method(record.method))
    if default is None:
        raise UsageError(
            f"{run} has no {RECIPE}, and the method {record.method} brings none; give --recipe FILE"
        )
    return default
