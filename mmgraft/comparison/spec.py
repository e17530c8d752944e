"""Comparisons: arms that share base, tower, data, seed and sets. Free of torch."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from mmgraft.data.formats.sources import is_there
from mmgraft.data.rows import HUB
from mmgraft.errors import UsageError, did_you_mean
from mmgraft.evaluation.sets import choose_sets
from mmgraft.recipes.evaluation_set import SetSpec, dialogue_sets
from mmgraft.recipes.recipe import DataEntry, Recipe
from mmgraft.recipes.source import find_recipe, key_value, load_recipe, read_yaml, shipped_recipes
from mmgraft.strict import StrictModel, about
from mmgraft.vision.spec import VisionSpec

#: Folder of the shipped comparisons, below the recipes.
FOLDER = "comparisons"
#: Key of the data of stages that have none of their own.
ALL_STAGES = "*"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Arm(StrictModel):
    """One graft of a comparison: a recipe, and the settings changed in it."""

    recipe: str | None = about("instead of the comparison's")
    description: str = ""
    set: dict[str, Any] = about("keys of the recipe, such as stages.tune.lr", dict)
    repeats: str | None = about("the arm that several seeds repeat")


class LawsSpec(StrictModel):
    """Rows that attention by layer is measured on."""

    path: str = Field(description="file of rows or items with an image between texts")
    images: str | None = None
    limit: int = about("sample so many of them", 64, ge=1)
    seed: int = about("seed of that sample", 0)

    def items(self) -> SetSpec:
        """Return how they are read."""
        return SetSpec(name="laws", metric="exact", **self.model_dump())


class DialoguesSpec(StrictModel):
    """Interleaved dialogues, built once from the ``choice`` sets and the same for every arm."""

    path: str | None = about("folder of saved ones, instead of new ones")
    count: int = about("dialogues of each shape", 100, ge=1)
    shapes: list[str] | None = about("such as [T, TV, V]; None: all that the sets give")
    seed: int = about("seed of the sample", 0)


class Comparison(StrictModel):
    """Several trainings that differ only in what is compared.

    Paths are taken from ``root`` where they are found there, else as they are. An arm's settings
    are those of its recipe, then ``seed``, then ``set``, then the arm's own ``set`` or the grid's
    values.
    """

    name: str = Field(pattern=f"^{NAME.pattern}$")
    description: str = ""
    base: str = Field(description="folder, alias or Hub id")
    vision: str | VisionSpec = Field(description="Hub id, folder or registered tower, or its spec")
    template: Literal["chat", "plain"] = "chat"
    seed: int | list[int] = about("or several: each arm once with each", 0)
    root: str | None = about("folder that paths start from")
    images: str | None = about("folder of images; None: of each file")
    data: dict[str, list[DataEntry]] = about("files of each stage, or of all under '*'", dict)
    recipe: str | None = about("recipe of arms that name none, and of a grid")
    set: dict[str, Any] = about("in the recipe of every arm", dict)
    arms: dict[str, Arm] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = about("keys of the recipe and the values that they take", dict)
    evaluation: list[SetSpec] = Field(default_factory=list)
    iit: DialoguesSpec | None = None
    laws: LawsSpec | None = None

    @field_validator("data", mode="before")
    @classmethod
    def _data_of_stages(cls, value: Any) -> Any:
        if isinstance(value, dict) and "path" not in value:
            return {stage: _entries(one) for stage, one in value.items()}
        return {ALL_STAGES: _entries(value)} if value else {}

    @model_validator(mode="after")
    def _check_arms(self) -> Self:
        if bool(self.arms) == bool(self.grid):
            raise ValueError(
                "arms and grid are both there; write one of them"
                if self.arms
                else "nothing to compare: write arms, or a grid of keys and their values"
            )
        for name, arm in self.arms.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"arm {name!r}: a name has letters, digits, dot, dash, underscore")
            if arm.recipe is None and self.recipe is None:
                raise ValueError(f"arm {name!r} names no recipe, and neither does the comparison")
        if self.grid and self.recipe is None:
            raise ValueError("a grid needs a recipe to vary; write recipe: NAME")
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid key {key!r} has no values; list at least one")
            if any(values.count(value) > 1 for value in values):
                raise ValueError(f"grid key {key!r} has a value twice; remove one")
        return self

    @model_validator(mode="after")
    def _check_sets(self) -> Self:
        seeds = self.seed if isinstance(self.seed, list) else [self.seed]
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"seed: {seeds} names no seed, or one twice; list each once")
        own = [name for name, arm in self.arms.items() if "seed" in arm.set and not arm.repeats]
        if isinstance(self.seed, list) and own:
            raise ValueError(f"arm {own[0]!r} sets its own seed; leave it out beside seed: {seeds}")
        names = [one.name for one in self.evaluation]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two evaluation sets are called {twice[0]!r}; rename one")
        if self.iit is not None and self.iit.path is None and not self.choices:
            raise ValueError(
                "iit builds dialogues of multiple choice, and no set of evaluation has metric: "
                "choice; write one, or name saved dialogues: iit: {path: FOLDER}"
            )
        return self

    @property
    def choices(self) -> list[SetSpec]:
        """The sets that dialogues are built from."""
        return dialogue_sets(self.evaluation)

    def all_arms(self) -> dict[str, Arm]:
        """Return the arms in order, a grid's expanded, each with its recipe and all settings.

        Of several seeds each has arms of its own, ``ARM.seed0``, all those of a seed together.
        """
        arms = self.arms or dict(self._grid_arms())
        found = {}
        for seed in self.seed if isinstance(self.seed, list) else [None]:
            for name, arm in arms.items():
                if seed is None or arm.repeats is not None:
                    shared, repeats, own = {"seed": self.seed}, arm.repeats, name
                else:
                    shared, repeats, own = {"seed": seed}, name, f"{name}.seed{seed}"
                found[own] = Arm(
                    recipe=arm.recipe or self.recipe,
                    description=arm.description,
                    set=_merged({**shared, **self.set}, arm.set),
                    repeats=repeats,
                )
        return found

    def _grid_arms(self) -> Iterator[tuple[str, Arm]]:
        labels = _labels(list(self.grid))
        taken: set[str] = set()
        for values in itertools.product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            word = "_".join(f"{labels[key]}-{_word(one)}" for key, one in chosen.items())
            numbered = (f"{word}.{number}" for number in itertools.count(2))
            name = next(one for one in itertools.chain([word], numbered) if one not in taken)
            taken.add(name)
            yield name, Arm(set=chosen)

    def placed(self) -> "Comparison":
        """Return the comparison with absolute paths wherever a file is found."""
        root = None if self.root is None else Path(self.root).expanduser()

        def at(path: str | None, exists: Callable[[Path], bool] = Path.is_dir) -> str | None:
            return _placed(path, root, exists)

        def moved(
            model: Any, images: str | None, exists: Callable[[Path], bool], *keys: str
        ) -> Any:
            update = {key: at(getattr(model, key), exists) for key in keys}
            return model.model_copy(update=update | {"images": at(model.images or images)})

        data = {
            stage: [moved(one, self.images, _is_data, "path") for one in entries]
            for stage, entries in self.data.items()
        }
        images = {"image": self.images}
        evaluation = [
            moved(one, images.get(one.modality), _is_data, "path", "train")
            for one in self.evaluation
        ]
        iit = self.iit and self.iit.model_copy(update={"path": at(self.iit.path)})
        laws = self.laws and moved(self.laws, self.images, Path.is_file, "path")
        update: dict[str, Any] = {"data": data, "evaluation": evaluation, "iit": iit, "laws": laws}
        update |= {"root": root and str(root.resolve()), "images": at(self.images)}
        return self.model_copy(update=update)

    def limited(self, limit: int | None) -> "Comparison":
        """Return the comparison with at most so many items of each set, rows and dialogues."""
        if limit is None:
            return self
        sets = choose_sets(self.evaluation, limit=limit)
        iit, laws = self.iit, self.laws
        if laws is not None:
            laws = laws.model_copy(update={"limit": min(limit, laws.limit)})
        if iit is not None:
            iit = iit.model_copy(update={"count": min(limit, iit.count)})
        return self.model_copy(update={"evaluation": sets, "iit": iit, "laws": laws})


def shipped_comparisons() -> list[str]:
    """Return the names of the comparisons that come with mmgraft, sorted."""
    return shipped_recipes(FOLDER)


def find_comparison(name: str | Path) -> Path:
    """Return the file of a comparison, by path or by the name of a shipped one.

    Raises:
        UsageError: There is none; names the nearest shipped one.
    """
    return find_recipe(name, "comparison", FOLDER)


def load_comparison(source: str | Path) -> Comparison:
    """Read and check a comparison; ``make_plan`` checks recipes and data of its arms.

    Args:
        source: A path, or the name of a shipped comparison.

    Raises:
        UsageError: No such file, no YAML, unknown keys, no arms, an empty grid.
    """
    path = find_comparison(source)
    data, _ = read_yaml(path)
    if "stages" in data and "arms" not in data and "grid" not in data:
        raise UsageError(
            f"{path} is a recipe, and a comparison has arms or a grid; train it with `mmgraft "
            "train`, or see `mmgraft recipes show easy-vqa`"
        )
    return Comparison.parse(data, str(path))


def arm_recipe(name: str, arm: Arm) -> Recipe:
    """Return the recipe of an arm, with its settings.

    Raises:
        UsageError: Names the arm: there is no such recipe, or it refuses a key or value.
    """
    assert arm.recipe is not None
    try:
        return load_recipe(arm.recipe, overrides=overrides_of(arm.set))
    except UsageError as error:
        raise UsageError(f"arm {name!r}: {str(error).removeprefix('--set ')}") from error


def is_comparison(path: Path) -> bool:
    """Return whether a YAML file is a comparison and not a recipe."""
    data, _ = read_yaml(path)
    return "arms" in data or "grid" in data


def dump_comparison(comparison: Comparison) -> str:
    """Return the comparison as YAML that :func:`load_comparison` reads back to an equal one."""
    return yaml.safe_dump(
        comparison.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )


def with_files(comparison: Comparison, data: Sequence[str], images: str | None) -> Comparison:
    """Return the comparison with files from the command line.

    Args:
        comparison: The comparison.
        data: ``FILE`` for all stages, or ``STAGE=FILE`` for one; several add up.
        images: Folder of the images of these files; without files, of all files.
    """
    update: dict[str, Any] = {} if images is None else {"images": images}
    given: dict[str, list[DataEntry]] = {}
    for item in data:
        stage, equals, path = item.partition("=")
        if not equals or Path(item).exists():
            stage, path = ALL_STAGES, item
        given.setdefault(stage, []).append(DataEntry(path=path, images=images))
    if given:
        update["data"] = given if ALL_STAGES in given else {**comparison.data, **given}
    return comparison.model_copy(update=update)


def with_settings(comparison: Comparison, settings: Sequence[str]) -> Comparison:
    """Return the comparison with settings from the command line, which come last.

    Args:
        comparison: The comparison.
        settings: ``KEY=VALUE`` for the recipes of all arms, ``ARM:KEY=VALUE`` for one arm's.

    Raises:
        UsageError: A text without ``=``, or an unknown arm.
    """
    if not settings:
        return comparison
    arms = comparison.all_arms()
    for text in settings:
        where, value = key_value(text, "--set", "seed=1 (ARM:seed=1 for one arm)")
        arm, colon, key = where.rpartition(":")
        if colon and not named_arms(arms, arm):
            raise UsageError(f"--set {text}: no arm {arm!r}; {did_you_mean(arm, arms)}")
        for name in named_arms(arms, arm) if colon else list(arms):
            update = {"set": _merged(arms[name].set, {key: value})}
            arms[name] = arms[name].model_copy(update=update)
    return comparison.model_copy(update={"arms": arms, "grid": {}})


def named_arms(arms: Mapping[str, Arm], name: str) -> list[str]:
    """Return the arm of a name, or those that repeat it with several seeds; else none."""
    return [one for one, arm in arms.items() if name in (one, arm.repeats)]


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as the ``key=value`` texts that recipes take."""
    texts = []
    for key, value in settings.items():
        dumped = yaml.safe_dump(value, default_flow_style=True, width=10**6)
        texts.append(f"{key}={dumped.removesuffix('...' + chr(10)).strip()}")
    return texts


def _merged(settings: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, the later ones last, because ``stages.*.lr`` overrides ``stages.tune.lr``."""
    return {**{key: one for key, one in settings.items() if key not in later}, **later}


def _entries(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"path": one} if isinstance(one, str) else one for one in items]


def _placed(path: str | None, root: Path | None, exists: Callable[[Path], bool]) -> str | None:
    """Return an absolute path where one is there, first below ``root``; else the path as it is."""
    if path is None or path.startswith(HUB):
        return path
    named = Path(path).expanduser()
    found = [one for one in ([] if root is None else [root / named]) + [named] if exists(one)]
    return str(found[0].resolve()) if found else path


def _is_data(path: Path) -> bool:
    return is_there(str(path))


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each key, or more of it where two keys end alike."""
    labels: dict[str, str] = {}
    for key in keys:
        parts = re.split(r"[.\[\]]+", key.strip("[]."))
        ends = [".".join(parts[-size:]) for size in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        unique = (end for end in ends if not any(one.endswith(f".{end}") for one in others))
        labels[key] = next(unique, ends[-1])
    return labels


def _word(value: Any) -> str:
    """Return a value as part of a name: ``[14, 22]`` is ``14-22``."""
    if isinstance(value, Mapping):
        text = "-".join(f"{key}-{_word(one)}" for key, one in value.items())
    elif isinstance(value, list):
        text = "-".join(map(_word, value))
    else:
        text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") or "none"
