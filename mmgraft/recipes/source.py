"""Recipes as YAML: found by name or path, overridden from the command line, refused by line."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mmgraft.errors import UsageError, did_you_mean
from mmgraft.grafts.registry import Method, methods
from mmgraft.recipes.recipe import DataEntry, Recipe, Stage
from mmgraft.strict import describe_item, dotted, listed
from mmgraft.textfiles import read_text

_PACKAGE = Path(__file__).resolve().parent


def recipe_dir() -> Path:
    """Return the folder of the shipped recipes.

    The wheel carries them inside the package; in a checkout they stand beside it.

    Raises:
        UsageError: When neither is there, which means a damaged installation.
    """
    for folder in (_PACKAGE / "shipped", _PACKAGE.parents[1] / "recipes"):
        if folder.is_dir():
            return folder
    raise UsageError(f"no recipes beside {_PACKAGE}; reinstall mmgraft")


_FROM_OTHERS = {
    "lr": "learning_rate",
    "epochs": "num_epochs num_train_epochs",
    "max_steps": "steps",
    "batch_size": "batch per_device_train_batch_size micro_batch_size",
    "accumulate": "gradient_accumulation gradient_accumulation_steps grad_accum",
    "optimizer": "optim",
    "schedule": "lr_scheduler_type scheduler",
    "warmup_ratio": "warmup",
    "clip_norm": "max_grad_norm",
    "max_length": "model_max_length max_seq_length",
    "train": "trainable",
    "tracking": "report_to",
    "save_every": "save_steps",
    "log_every": "logging_steps",
    "eval_every": "eval_steps",
    "images": "image_folder",
    "path": "data_path",
}
#: Names that other trainers have for a key of ours, for the message about an unknown key.
OTHER_NAMES = {other: ours for ours, others in _FROM_OTHERS.items() for other in others.split()}

Location = tuple["str | int", ...]


def shipped_recipes(folder: str = ".") -> list[str]:
    """Return the names of the recipes that come with mmgraft, sorted; or of those in a folder."""
    return sorted(path.stem for path in (recipe_dir() / folder).glob("*.yaml"))


def find_recipe(name: str | Path, kind: str = "recipe", folder: str = ".") -> Path:
    """Return the file of a recipe named by path or by the name of a shipped one.

    Args:
        name: The path or the name.
        kind: What an error calls it.
        folder: Where the shipped ones are, below the recipes.

    Raises:
        UsageError: There is none; names the nearest shipped one.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = recipe_dir() / folder / f"{name}.yaml"
    if path.name == str(name) and shipped.is_file():
        return shipped
    if path.suffix in (".yaml", ".yml") or path.name != str(name):
        raise UsageError(f"no {kind} file {path}; `mmgraft recipes ls` lists the shipped ones")
    raise UsageError(
        f"no {kind} {str(name)!r}; {did_you_mean(str(name), shipped_recipes(folder))} "
        "`mmgraft recipes ls` lists them"
    )


def method_recipe(method: Method) -> Path | None:
    """Return the recipe that a method brings: a shipped one by its file name, or a file of its
    package.

    Raises:
        UsageError: It names a file that is not there.
    """
    if method.recipe is None:
        return None
    path = Path(method.recipe)
    return find_recipe(path if path.is_absolute() else path.stem)


def load_recipe(
    source: str | Path, method: str | None = None, overrides: Sequence[str] | None = None
) -> Recipe:
    """Read and check a recipe.

    Args:
        source: A path, or the name of a shipped recipe.
        method: Refuse a recipe for another method.
        overrides: ``key=value`` texts, such as ``stages.align.lr=1e-4`` or ``seed=3``.

    Raises:
        UsageError: For YAML that cannot be read, an unknown key (with the nearest right one and its
            line), a wrong value, or a recipe for another method.
    """
    path = find_recipe(source)
    data, lines = read_yaml(path)
    for override in overrides or ():
        _apply(data, override)
    recipe = _check(data, str(path), lines)
    if method is not None and recipe.method != method:
        raise UsageError(
            f"{path} is a recipe for {recipe.method}, but the graft is {method}; take one of "
            f"{', '.join(_shipped_for(method)) or 'your own'} or run `mmgraft recipes ls`"
        )
    _check_method(recipe, str(path))
    return recipe


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """Return the YAML mapping in a file and the line (from 1) of every key in it.

    Raises:
        UsageError: For a file that is no YAML, no mapping, or has a key twice.
    """
    data, lines = _read(read_text(path), str(path))
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds no settings; `mmgraft recipes show iaa` shows how to write")
    return data, lines


def _read(text: str, what: str) -> tuple[Any, dict[Location, int]]:
    lines: dict[Location, int] = {}
    try:
        _collect_lines(yaml.compose(text, Loader=yaml.SafeLoader), (), lines, what)
        return yaml.safe_load(text), lines
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{what} is not YAML: {error}") from error


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML that :func:`load_recipe` reads back to an equal one."""
    return yaml.safe_dump(
        recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )


def entry_of(
    path: str, images: str | Path | None = None, read: Sequence[str] | None = None
) -> DataEntry:
    """Return the entry of a file from the command line.

    Args:
        path: The file, or what else a recipe may name.
        images: Folder that image paths start from.
        read: ``key=value`` texts of the entry: ``format=swift``, ``columns.question=q``.

    Raises:
        UsageError: An unknown key or a wrong value.
    """
    data: dict[str, Any] = {}
    for setting in read or ():
        _apply(data, setting)
    folder = {} if images is None else {"images": str(images)}
    return DataEntry.parse({"path": path, **folder, **data}, "--read")


def with_data(
    recipe: Recipe,
    data: Sequence[str] | None,
    images: str | None,
    read: Sequence[str] | None = None,
) -> Recipe:
    """Return the recipe with its data replaced by files from the command line.

    Args:
        recipe: What was loaded.
        data: ``FILE`` for every stage, or ``STAGE=FILE`` for one. Several add up.
        images: Folder of the images of all these files; alone, of the recipe's own entries.
        read: ``KEY=VALUE`` of the entries of these files, such as ``format=swift``.

    Raises:
        UsageError: For an unknown stage, and ``read`` without ``data``.
    """
    if read and not data:
        raise UsageError("--read is of files that --data names; give them, or change the recipe")
    names = [stage.name for stage in recipe.stages]
    chosen: dict[str | None, list[DataEntry]] = {}
    for item in data or ():
        stage, _, path = item.partition("=")
        if not path or (stage not in names and Path(item).exists()):
            stage, path = None, item
        elif stage not in names:
            raise UsageError(f"--data {item}: no stage {stage!r}; {did_you_mean(stage, names)}")
        chosen.setdefault(stage, []).append(entry_of(path, images, read))
    stages = []
    for stage in recipe.stages:
        entries = chosen.get(stage.name) or chosen.get(None)
        if entries is None and not data and images and stage.data is not None:
            entries = [entry.model_copy(update={"images": images}) for entry in stage.data]
        stages.append(stage if entries is None else stage.model_copy(update={"data": entries}))
    update: dict[str, Any] = {"stages": stages}
    if images and not data:
        update["data"] = [e.model_copy(update={"images": images}) for e in recipe.data]
    return recipe.model_copy(update=update)


def with_max_steps(recipe: Recipe, max_steps: int | None) -> Recipe:
    """Return the recipe with every stage ending after ``max_steps`` steps; None: as it is."""
    if max_steps is None:
        return recipe
    stages = [s.model_copy(update={"max_steps": max_steps, "epochs": None}) for s in recipe.stages]
    return recipe.model_copy(update={"stages": stages})


def _check(data: dict[str, Any], what: str, lines: dict[Location, int]) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems: list[str] = []
        for item in error.errors(include_url=False):
            loc = tuple(item["loc"])
            text = describe_item(item, Recipe)
            if item["type"] == "extra_forbidden" and loc[-1] in OTHER_NAMES:
                text = f"unknown key {dotted(loc)!r}; here it is called {OTHER_NAMES[loc[-1]]!r}"
            elif item["type"] == "extra_forbidden" and loc[0] == "stages" and len(loc) == 3:
                text = _unknown_in_stage(loc, methods().get(data.get("method", "")))
            line = _line_of(loc, lines)
            problems.append(f"line {line}: {text}" if line else text)
    raise UsageError(listed(what, problems))


def _unknown_in_stage(loc: Location, method: Method | None) -> str:
    switches = list(method.stage.model_fields) if method else []
    hint = did_you_mean(str(loc[-1]), [*switches, *Stage.model_fields])
    text = f"unknown key {dotted(loc)!r}; {hint}"
    if method is None:
        return text
    own = f"may also switch {', '.join(switches)}" if switches else "has no keys of its own"
    return f"{text} A stage of method {method.name} {own}."


def _line_of(loc: Location, lines: dict[Location, int]) -> int | None:
    while loc:
        if loc in lines:
            return lines[loc]
        loc = loc[:-1]
    return None


def _collect_lines(node: Any, at: Location, lines: dict[Location, int], what: str) -> None:
    if isinstance(node, yaml.ScalarNode):
        # YAML 1.1 reads 010 as 8 and 1:30 as 90
        if node.tag.endswith((":int", ":float")) and re.match(r"[-+]?0[\d_]|.*:", node.value):
            raise UsageError(
                f"{what}, line {node.start_mark.line + 1}: {node.value} would be read in base 8 or "
                "60; write a decimal number, or put it in quotes"
            )
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise UsageError(f"{what}, line {line}: key {key.value!r} twice; remove one")
            seen.add(key.value)
            lines[(*at, key.value)] = line
            _collect_lines(value, (*at, key.value), lines, what)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _collect_lines(value, (*at, index), lines, what)


def key_value(given: str, flag: str, such_as: str) -> tuple[str, Any]:
    """Read ``key=value`` of an option, the value as YAML.

    Raises:
        UsageError: It is something else.
    """
    key, equals, text = given.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{flag} {given}: write key=value, such as {flag} {such_as}")
    return key.strip(), _read(text, f"{flag} {given}")[0]


def template_options(given: Sequence[str] | None) -> dict[str, Any]:
    """Read the values of ``--template-option``."""
    return dict(key_value(one, "--template-option", "enable_thinking=false") for one in given or ())


def _apply(data: dict[str, Any], override: str) -> None:
    key, value = key_value(override, "--set", "stages.0.lr=1e-4")
    parts = [part for part in re.split(r"[.\[\]]+", key) if part]
    _set(data, parts, value, override)


def _set(node: dict[str, Any] | list[Any], parts: list[str], value: Any, override: str) -> None:
    part, rest = parts[0], parts[1:]
    if isinstance(node, list):
        for index in _indices(node, part, override):
            if rest:
                _set(node[index], rest, value, override)
            else:
                node[index] = value
        return
    if not rest:
        node[part] = value
        return
    below = node.get(part)
    if not isinstance(below, dict | list):
        if below is None:
            below = [{}] if rest[0].isdigit() else {}
        elif part == "lr":  # one rate for all becomes a rate a group
            below = {"default": below}
        else:
            raise UsageError(f"--set {override}: {part} is one value; set {part} itself")
        node[part] = below
    _set(below, rest, value, override)


def _indices(node: list[Any], part: str, override: str) -> list[int]:
    if part == "*":
        return list(range(len(node)))
    if part.isdigit():
        if int(part) >= len(node):
            raise UsageError(f"--set {override}: there are {len(node)} entries, counted from 0")
        return [int(part)]
    names = [str(item.get("name")) for item in node if isinstance(item, dict) and "name" in item]
    if part not in names:
        raise UsageError(f"--set {override}: no entry {part!r}; {did_you_mean(part, names)}")
    return [names.index(part)]


def _shipped_for(method: str) -> list[str]:
    found = []
    for name in shipped_recipes():
        data, _ = read_yaml(recipe_dir() / f"{name}.yaml")
        if data.get("method") == method:
            found.append(name)
    return found


def _check_method(recipe: Recipe, what: str) -> None:
    known = methods()
    if recipe.method not in known:
        raise UsageError(
            f"{what}: no method {recipe.method!r}; {did_you_mean(recipe.method, known)}"
        )
    fields = known[recipe.method].config_class.model_fields
    for key in recipe.graft.config:
        if key not in fields:
            raise UsageError(
                f"{what}: unknown key 'graft.config.{key}'; {did_you_mean(key, fields)}"
            )
