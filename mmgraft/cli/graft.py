"""``mmgraft graft``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic.fields import FieldInfo

from mmgraft.aliases import resolve_alias
from mmgraft.atomic import atomic_text, free_name
from mmgraft.cli.console import human_bytes, human_count, note, print_json, stdout, table
from mmgraft.cli.loading import uncollected
from mmgraft.cli.options import (
    DryRunFlag,
    ForceFlag,
    JsonFlag,
    RevisionOption,
    argument,
    option,
    with_options,
)
from mmgraft.errors import UsageError
from mmgraft.grafts.registry import built_in, get_method, methods, moved
from mmgraft.model.files.graft_file import GraftFile, TemplateChoice
from mmgraft.recipes import source
from mmgraft.recipes.recipe import GraftDefaults, Recipe
from mmgraft.strict import Option
from mmgraft.textfiles import read_text
from mmgraft.vision.projectors.configs import ProjectorConfig
from mmgraft.vision.projectors.registry import PROJECTORS, find_projector

_OF_A_RUN = (
    "checkpoints", "metrics.jsonl", "recipe.used.yaml", "text-before.safetensors",
    "versions.json", "workflows",
)  # fmt: skip
#: Flags of the command whose parameters are called otherwise.
_FLAGS = {"set", "help"}
_SEE = "Tower, projector and text"
_METHODS = ", ".join(method.name for method in built_in() if method.recipe)


def _settings() -> dict[str, tuple[Any, None]]:
    """Return an option for every setting of a method that says it is one.

    Methods may share a name: all but switches are text, which the method at hand reads its way.
    """
    found: dict[str, dict[str, FieldInfo]] = {}
    for method in methods().values():
        for name, info in method.config_class.model_fields.items():
            if _help(info) is not None and name not in _FLAGS:
                found.setdefault(name, {})[method.name] = info
    return {name: (_setting(name, of), None) for name, of in found.items()}


def _setting(name: str, of: dict[str, FieldInfo]) -> Any:
    """Return the option for a setting of one method, or of several that share its name."""
    first = next(iter(of.values()))
    flag = f"--{name.replace('_', '-')}"
    flag += f"/--no-{flag[2:]}" if bool in _kinds(first) else ""
    text = str(_help(first))
    if len(of) > 1:
        text = " ".join(f"{method}: {_help(info)}" for method, info in of.items())
    kind = bool if bool in _kinds(first) else str
    return Annotated[kind | None, option(flag, text, panel=f"Method {', '.join(of)}")]


def _help(info: FieldInfo) -> str | None:
    return next((one.help for one in info.metadata if isinstance(one, Option)), None)


def _kinds(info: FieldInfo) -> tuple[Any, ...]:
    return info.annotation, *get_args(info.annotation)


_LAYERS = "Base layers to graft: 22,24, 0-31:5, every:4, last:8, spread:8, all."
_TOWER = "Tower: Hub id, folder or registered name."
_FEATURES = "Hidden state of the tower that is read; -2 when not given."
_PROJECTOR = f"Projector: {', '.join(PROJECTORS.known)} or an installed one."
_NORM = "--projector-norm/--no-projector-norm", "A norm before the projector."
_ProjectorOption = Annotated[
    list[str] | None,
    option("--projector-option", "KEY=VALUE of the projector; may be repeated.", panel=_SEE),
]
_TEMPLATE = "Template: chat, plain or a jinja file."
_TemplateOption = Annotated[
    list[str] | None,
    option("--template-option", "KEY=VALUE of the template; may be repeated.", panel=_SEE),
]
_RECIPE = "Recipe, shipped name or file: settings, and how to train."
_SET = "KEY=VALUE of the method's config; may be repeated."
_VERIFY = "Fingerprint of the base: fast reads edges of its tensors, full all."


@with_options("vision", _settings())
def graft(
    base: Annotated[str, argument("Alias, Hub id or folder of the language model.")],
    method: Annotated[str | None, option(f"Method: {_METHODS} or an installed one.")] = None,
    layers: Annotated[str | None, option(_LAYERS)] = None,
    vision: Annotated[str | None, option(_TOWER, panel=_SEE)] = None,
    feature_layer: Annotated[int | None, option(_FEATURES, panel=_SEE)] = None,
    projector: Annotated[str | None, option(_PROJECTOR, panel=_SEE)] = None,
    projector_norm: Annotated[bool | None, option(*_NORM, panel=_SEE)] = None,
    projector_option: _ProjectorOption = None,
    template: Annotated[str | None, option(_TEMPLATE, panel=_SEE)] = None,
    template_option: _TemplateOption = None,
    workflow: Annotated[str | None, option("Name of the new workflow; else mm.")] = None,
    recipe: Annotated[str | None, option(_RECIPE)] = None,
    set_: Annotated[list[str] | None, option("--set", _SET)] = None,
    out: Annotated[Path | None, option("Folder; ./<model>-<method> when not given.")] = None,
    revision: RevisionOption = None,
    verify: Annotated[str, option(_VERIFY)] = "fast",
    force: ForceFlag = False,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
    **settings: Any,
) -> None:
    """Put a vision tower on a language model: a small file of new tensors, and how to train them.

    The base is never loaded: only the tensors that the graft copies are read from its files.
    """
    chosen = source.load_recipe(recipe, method=method) if recipe is not None else None
    config = _config(method, {"layers": layers, **settings}, set_ or [], chosen)
    kind = get_method(config.method)
    target = out or Path(f"{Path(base.rstrip('/')).name.lower() or 'model'}-{kind.name}")
    defaults = chosen.graft if chosen else GraftDefaults()
    _check(target, force, verify)
    with uncollected():  # here torch is loaded
        from mmgraft.model.files.create import create_graft
    record = create_graft(
        resolve_alias(base),
        defaults.tower(vision, feature_layer),
        config,
        target,
        workflow=workflow or (chosen and chosen.workflow) or "mm",
        projector=_projector(defaults, projector, projector_norm, projector_option or []),
        template=_template(template, source.template_options(template_option)),
        revision=revision,
        full_fingerprint=verify == "full",
        dry_run=dry_run,
    )
    if dry_run:
        _show_plan(record, target, f"{kind.name} on {resolve_alias(base)}", json)
    else:
        _finish(target, source.find_recipe(recipe) if recipe else source.method_recipe(kind), json)


def _check(folder: Path, force: bool, verify: str) -> None:
    """Refuse what can be refused before torch is loaded."""
    if verify not in ("fast", "full"):
        raise UsageError(f"--verify {verify}: choose fast or full")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not force:
        raise UsageError(
            f"{folder} is not empty; give --force to write into it, or another folder with --out"
        )


def _show_plan(record: GraftFile, folder: Path, what: str, json: bool) -> None:
    if json:
        print_json({"folder": str(folder), "written": False, **record.model_dump(mode="json")})
    else:
        note(f"would write a graft of method {what} into {folder}")


def _put_aside(folder: Path) -> None:
    """Move what an earlier graft's training left, so that it is not taken for the new one's."""
    left = [folder / name for name in _OF_A_RUN if (folder / name).exists()]
    if not left:
        return
    aside = free_name(folder / "before", "-")
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    note(f"what an earlier training left in {folder} is in {aside.name} now")


def _config(
    method: str | None, given: dict[str, Any], settings: list[str], recipe: Recipe | None
) -> Any:
    """Return the method's config: the recipe's settings, then the options, then --set."""
    method = method or (recipe.method if recipe else None)
    if method is None:
        raise UsageError(f"name the method with --method: {', '.join(methods())}")
    fields = get_method(method).config_class.model_fields
    own = {*_FLAGS, *graft.__code__.co_varnames[: graft.__code__.co_argcount]} - {"layers"}
    for name in [name for name, info in fields.items() if name in own and _help(info)]:
        note(f"--{name} is the command's own; set that of method {method} with --set {name}=VALUE")
    values: dict[str, Any] = dict(recipe.graft.config) if recipe else {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in fields:
            raise UsageError(
                f"--{name.replace('_', '-')} is no setting of method {method}; "
                f"leave it out, or see: mmgraft methods"
            )
        if isinstance(value, bool) and bool not in _kinds(fields[name]):
            raise UsageError(
                f"--{name.replace('_', '-')} is a switch, and no switch of method {method}; set it "
                f"with --set {name}=VALUE"
            )
        kinds = _kinds(fields[name])
        is_list = str not in kinds and any(get_origin(one) is list for one in kinds)
        values[name] = value.split(",") if is_list and isinstance(value, str) else value
    values |= dict(source.key_value(setting, "--set", "layers=last:8") for setting in settings)
    name, values, note_ = moved(method, values)
    if note_ is not None:
        note(note_)
    return get_method(name).config_class.parse(values, f"settings of method {name}")


def _projector(
    defaults: GraftDefaults, name: str | None, norm: bool | None, options: list[str]
) -> ProjectorConfig:
    """Return the settings: the recipe's where it names the same projector, then the options."""
    own = defaults.projector
    name = name or str(own.kind)
    same, kind = name == own.kind, find_projector(name).config_class
    if norm is not None and "norm" not in kind.model_fields:
        raise UsageError(f"--projector-norm is no setting of projector {name}; leave it out")
    values = {**(own.model_dump() if same else {}), **({} if norm is None else {"norm": norm})}
    values |= dict(source.key_value(one, "--projector-option", "latents=16") for one in options)
    return kind.parse(values, f"settings of projector {name}")


def _template(spec: str | None, options: dict[str, Any]) -> TemplateChoice:
    if spec in (None, "chat", "plain"):
        return TemplateChoice(kind="plain" if spec == "plain" else "chat", options=options)
    path = Path(spec).expanduser()
    if not path.is_file():  # one of the base's templates, by its name
        return TemplateChoice(kind="chat", text=spec, options=options)
    return TemplateChoice(kind="file", text=read_text(path), options=options)


def _finish(folder: Path, recipe: Path | None, json: bool) -> None:
    """Put the recipe beside a new graft, and show what was written."""
    from mmgraft.model.files.summary import summarise_graft

    _put_aside(folder)
    if recipe is not None:
        atomic_text(folder / "recipe.yaml", read_text(recipe))
    summary = summarise_graft(folder)
    if json:
        print_json({"folder": str(folder), "written": True, **asdict(summary)})
        return
    rows = [
        [part.part, human_count(part.parameters), human_bytes(part.bytes)] for part in summary.parts
    ]
    rows.append(["added in all", human_count(summary.parameters), human_bytes(summary.bytes)])
    stdout().print(table(["part", "parameters", "size"], rows))
    note(f"grafted {summary.method} onto {summary.base} in {folder}")
    note(f"next: mmgraft train {folder} --data ROWS.jsonl")
