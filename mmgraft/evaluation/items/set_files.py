"""Which sets are meant: those of a run's recipe, of a YAML file, or one from the command line.

Free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from mmgraft.errors import UsageError, did_you_mean
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.recipes.source import find_recipe, read_yaml
from mmgraft.strict import StrictModel

RUN_RECIPES = ("recipe.used.yaml", "recipe.yaml")
"""Where a run keeps its recipe: as it was trained, else as it was written."""


class _Sets(StrictModel):
    evaluation: list[SetSpec] = Field(default_factory=list)


def load_sets(source: str | Path) -> list[SetSpec]:
    """The sets under `evaluation:` of a YAML file: a recipe, a comparison, or the list alone.

    Args:
        source: A path, or the name of a shipped recipe.

    Raises:
        UsageError: There is no such file, it names no set, or a set is not right.
    """
    path = find_recipe(source)
    found = _read(path)
    if not found:
        raise UsageError(
            f"{path} names no set to evaluate on; write a list under `evaluation:`, "
            "such as - {name: test, metric: exact, path: test.jsonl}"
        )
    return found


def run_sets(run: Path) -> list[SetSpec]:
    """The sets that a run's own recipe names; none where it names none.

    Raises:
        UsageError: A set is not right.
    """
    for name in RUN_RECIPES:
        if (run / name).is_file() and (found := _read(run / name)):
            return found
    return []


def choose_sets(
    specs: Sequence[SetSpec], only: Sequence[str] = (), limit: int | None = None
) -> list[SetSpec]:
    """Some of the sets, each drawn down to a limit.

    Raises:
        UsageError: Two sets of one name, or a name that no set has.
    """
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two sets are called {twice[0]!r}; give each its own name")
    for name in only:
        if name not in names:
            raise UsageError(f"no set is called {name!r}; {did_you_mean(name, names)}")
    chosen = [spec for spec in specs if not only or spec.name in only]
    if limit is None:
        return chosen
    return [spec.model_copy(update={"limit": min(limit, spec.limit or limit)}) for spec in chosen]


def given_set(path: str, metric: str | None, **settings: Any) -> SetSpec:
    """A set named on the command line; settings that are None are left out.

    Raises:
        UsageError: No metric, or settings that do not go together.
    """
    if metric is None:
        raise UsageError(f"--data {path}: say how answers are scored, such as --metric exact")
    given = {name: value for name, value in settings.items() if value is not None}
    given.setdefault("name", Path(path).name.split(".")[0])
    return SetSpec.parse({"path": path, "metric": metric, **given}, f"--data {path}")


def _read(path: Path) -> list[SetSpec]:
    data, _ = read_yaml(path.read_text(encoding="utf-8"), str(path))
    sets = data.get("evaluation") or []
    return _Sets.parse({"evaluation": sets}, str(path)).evaluation
