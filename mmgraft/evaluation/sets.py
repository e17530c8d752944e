"""The sets to evaluate on: those of a recipe, a YAML file or the command line, read and checked.

Free of torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mmgraft.errors import UsageError, did_you_mean
from mmgraft.evaluation.items.files import data_file, read_items, read_training_answers, set_sha256
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.metrics.intervals import Groups, Measured
from mmgraft.evaluation.metrics.scoring import measure_answers, measure_prior
from mmgraft.frozen import Frozen
from mmgraft.progress import say
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.recipes.source import find_recipe, read_yaml
from mmgraft.runs.results import SetResult
from mmgraft.strict import StrictModel

#: Files of a run's recipe: as it was trained, else as it was written.
RUN_RECIPES = ("recipe.used.yaml", "recipe.yaml")


class _Sets(StrictModel):
    evaluation: list[SetSpec] = Field(default_factory=list)


# -- which sets ---------------------------------------------------------------------------------


def load_sets(source: str | Path) -> list[SetSpec]:
    """Read the sets under ``evaluation:`` of a YAML file: a recipe, a comparison, or the list
    alone.

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
    """Read the sets that a run's own recipe names; none where it names none.

    Raises:
        UsageError: A set is not right.
    """
    found = (_read(run / name) for name in RUN_RECIPES if (run / name).is_file())
    return next(filter(None, found), [])


def choose_sets(
    specs: Sequence[SetSpec], only: Sequence[str] = (), limit: int | None = None
) -> list[SetSpec]:
    """Choose some of the sets, each limited to a sample of its items.

    Raises:
        UsageError: Two sets of one name, or a name that no set has.
    """
    names = _names(specs)
    for name in only:
        if name not in names:
            raise UsageError(f"no set is called {name!r}; {did_you_mean(name, names)}")
    chosen = [spec for spec in specs if not only or spec.name in only]
    if limit is None:
        return chosen
    return [spec.model_copy(update={"limit": min(limit, spec.limit or limit)}) for spec in chosen]


def given_set(path: str, metric: str | None, **settings: Any) -> SetSpec:
    """Make a set of what the command line says; settings that are None are left out.

    Raises:
        UsageError: No metric, or settings that do not go together.
    """
    if metric is None:
        raise UsageError(f"--data {path}: say how answers are scored, such as --metric exact")
    given = {name: value for name, value in settings.items() if value is not None}
    given.setdefault("name", Path(path).name.split(".")[0])
    return SetSpec.parse({"path": path, "metric": metric, **given}, f"--data {path}")


def _read(path: Path) -> list[SetSpec]:
    data, _ = read_yaml(path)
    sets = data.get("evaluation") or []
    return _Sets.parse({"evaluation": sets}, str(path)).evaluation


def _names(specs: Sequence[SetSpec]) -> list[str]:
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two sets are called {twice[0]!r}; give each its own name")
    return names


# -- what they hold -----------------------------------------------------------------------------


class EvaluatedSet(Frozen):
    """A set that was read and checked.

    Attributes:
        spec: The recipe's settings of it.
        file: Its file of items.
        items: In the order of the file.
        prior: The score of the most frequent training answers; None without training rows.
    """

    spec: SetSpec
    file: Path
    items: list[Item]
    prior: Measured | None = None

    @property
    def plain_texts(self) -> bool:
        """Return whether items are texts, and not questions with answers."""
        return self.spec.metric == "perplexity" and not self.spec.chat

    def result(
        self, measured: Measured, groups: Groups, settings: dict[str, Any], **more: Any
    ) -> SetResult:
        """Return what was measured, as results keep it; settings that are None are left out."""
        return SetResult(
            name=self.spec.name,
            metric=self.spec.metric,
            main=measured.main,
            file=self.file.name,
            sha256=set_sha256(self.spec, self.file),
            items=len(self.items),
            scores=measured.scores(groups),
            settings={name: value for name, value in settings.items() if value is not None},
            **more,
        )


def read_sets(specs: Sequence[SetSpec], modality: Literal["text", "image"]) -> list[EvaluatedSet]:
    """Read and check sets of text, or those with images, before a model is loaded.

    Args:
        specs: The sets.
        modality: What they have to be of.

    Raises:
        UsageError: Two sets of one name, no set with images, one of the other modality, or one
            that its metric cannot score; names file and row.
    """
    _names(specs)
    if modality == "image" and not specs:
        raise UsageError(
            "no set with images to evaluate; write one under `evaluation:` in the recipe, or name "
            "a file: --data FILE --metric exact"
        )
    for spec in specs:
        if spec.modality != modality:
            is_text = spec.modality == "text"
            found, flag = ("is of text", "--text") if is_text else ("has images", "--vision")
            raise UsageError(f"set {spec.name!r} {found}; evaluate it with {flag}")
    read = _text_set if modality == "text" else _image_set
    return [read(spec, read_items(spec)) for spec in specs]


def _text_set(spec: SetSpec, items: list[Item]) -> EvaluatedSet:
    for item in items:
        if not spec.chat and len(item.messages) > 1:
            raise UsageError(
                f"{item.where}: several turns, and plain text is one question by itself; write "
                "chat: true"
            )
    return EvaluatedSet(spec, data_file(spec), items)


def _image_set(spec: SetSpec, items: list[Item]) -> EvaluatedSet:
    if spec.metric != "choice":
        measure_answers(spec, items, [""] * len(items))  # refuses what it could not score
    prior = None
    if "prior" in spec.blind and spec.train is not None:
        prior = measure_prior(spec, items, read_training_answers(spec))
    elif "prior" in spec.blind:
        say(f"{spec.name}: no training rows (train: FILE), so no prior score")
    return EvaluatedSet(spec, data_file(spec), items, prior)
