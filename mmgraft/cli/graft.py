"""`mmgraft graft`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer

from mmgraft.cli.options import DryRunFlag, ForceFlag, JsonFlag, RevisionOption
from mmgraft.grafts.registry import built_in, methods
from mmgraft.strict import Option

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from mmgraft.recipes.recipe import GraftDefaults, Recipe
    from mmgraft.vision.projectors.configs import ProjectorConfig

_OF_A_RUN = (
    "checkpoints",
    "metrics.jsonl",
    "recipe.used.yaml",
    "text-before.safetensors",
    "versions.json",
    "workflows",
)
_SEE = "Tower, projector and text"
_METHODS = ", ".join(method.name for method in built_in() if method.recipe)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every setting of a method that says it is one, as keywords."""
    signature = inspect.signature(command, eval_str=True)
    given = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    names = [one.name for one in given]
    made: dict[str, inspect.Parameter] = {}
    for method in methods().values():
        for name, info in method.config_class.model_fields.items():
            option = next((one for one in info.metadata if isinstance(one, Option)), None)
            if option is not None and name not in made and name not in names:
                made[name] = _setting(name, info, option, f"Method {method.name}")
    at = names.index("layers") + 1
    parameters = [*given[:at], *made.values(), *given[at:]]
    command.__dict__["__signature__"] = signature.replace(parameters=parameters)
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _setting(name: str, info: FieldInfo, option: Option, panel: str) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    types = [one for one in (info.annotation, *get_args(info.annotation)) if isinstance(one, type)]
    kind = next((one for one in types if one in (bool, int, float)), str)
    if kind is bool and info.default:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    shown = typer.Option(flag, help=option.help, rich_help_panel=panel)
    annotation = Annotated[kind | None, shown]
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, keyword, default=None, annotation=annotation)


@with_settings
def graft(
    base: Annotated[str, typer.Argument(help="Alias, Hub id or folder of the language model.")],
    method: Annotated[
        str | None, typer.Option("--method", help=f"{_METHODS} or an installed one.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Where: 22,24 or 0-31:5, every:4, last:8, all."),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option("--vision", help="Hub id, folder or registered tower.", rich_help_panel=_SEE),
    ] = None,
    feature_layer: Annotated[
        int | None,
        typer.Option(
            "--feature-layer", help="Hidden state of the tower; -2.", rich_help_panel=_SEE
        ),
    ] = None,
    projector: Annotated[
        str | None,
        typer.Option(
            "--projector",
            help="mlp, linear, pixel_shuffle, pool or an installed one; mlp.",
            rich_help_panel=_SEE,
        ),
    ] = None,
    projector_norm: Annotated[
        bool | None,
        typer.Option(
            "--projector-norm/--no-projector-norm",
            help="A norm before the projector.",
            rich_help_panel=_SEE,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="chat, plain or a jinja file.", rich_help_panel=_SEE),
    ] = None,
    workflow: Annotated[
        str | None, typer.Option("--workflow", help="Name of the new workflow; mm.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Shipped name or file: its settings, and how to train."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of the method's config; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; ./<model>-<method> when not given.")
    ] = None,
    revision: RevisionOption = None,
    verify: Annotated[
        str, typer.Option("--verify", help="full hashes every byte of the base, not its edges.")
    ] = "fast",
    force: ForceFlag = False,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
    **settings: Any,
) -> None:
    """Put a vision tower on a language model: a small file of new tensors, and how to train them.

    The base is never loaded: only the tensors that the graft copies are read from its files.
    """
    from mmgraft.aliases import default_tower, resolve_alias
    from mmgraft.cli.console import note, print_json
    from mmgraft.errors import UsageError
    from mmgraft.grafts.registry import get_method
    from mmgraft.recipes.source import find_recipe, load_recipe, method_recipe
    from mmgraft.vision.spec import VisionSpec

    chosen = load_recipe(recipe, method=method) if recipe is not None else None
    kind = get_method(method or (chosen.method if chosen else _missing_method()))
    config = _config(kind, {"layers": layers, **settings}, set_ or [], chosen)
    kind = get_method(config.method)
    if verify not in ("fast", "full"):
        raise UsageError(f"--verify {verify}: choose fast or full")
    target = out or Path(f"{_short(base)}-{kind.name}")
    folder_base = resolve_alias(base)
    defaults = chosen.graft if chosen else None
    spec = VisionSpec.from_name(vision or (defaults and defaults.vision) or default_tower())
    if vision is None and defaults and defaults.vision_options:
        spec = spec.model_copy(update={"options": dict(defaults.vision_options)})
    layer = feature_layer if feature_layer is not None else defaults and defaults.feature_layer
    if layer is not None:
        spec = spec.model_copy(update={"feature_layer": layer})
    written = find_recipe(recipe) if recipe is not None else method_recipe(kind)
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not force:
        raise UsageError(
            f"{target} is not empty; give --force to write into it, or another folder with --out"
        )
    from mmgraft.cli.loading import uncollected

    with uncollected():  # here torch is loaded
        from mmgraft.model.files.create import create_graft
        from mmgraft.model.files.summary import summarise_graft

    record = create_graft(
        folder_base,
        spec,
        config,
        target,
        workflow=workflow or (chosen and chosen.workflow) or "mm",
        projector=_projector(defaults, projector, projector_norm),
        template=_template(template),
        revision=revision,
        full_fingerprint=verify == "full",
        dry_run=dry_run,
    )
    if dry_run:
        if json:
            print_json({"folder": str(target), "written": False, **record.model_dump(mode="json")})
            return
        note(f"would write a graft of method {kind.name} on {folder_base} into {target}")
        return
    _put_aside(target)
    if written is not None:
        from mmgraft.atomic import atomic_text

        atomic_text(target / "recipe.yaml", written.read_text(encoding="utf-8"))
    summary = summarise_graft(target)
    _report(summary, target, json)


def _put_aside(folder: Path) -> None:
    """Move what an earlier graft's training left, so that it is not taken for the new one's."""
    from mmgraft.cli.console import note

    left = [folder / name for name in _OF_A_RUN if (folder / name).exists()]
    if not left:
        return
    number = 1
    while (folder / f"before-{number}").exists():
        number += 1
    aside = folder / f"before-{number}"
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    note(f"what an earlier training left in {folder} is in {aside.name} now")


def _missing_method() -> str:
    from mmgraft.errors import UsageError
    from mmgraft.grafts.registry import methods

    raise UsageError(f"name the method with --method: {', '.join(methods())}")


def _short(base: str) -> str:
    return Path(base.rstrip("/")).name.lower() or "model"


def _config(kind: Any, given: dict[str, Any], settings: list[str], recipe: Recipe | None) -> Any:
    """The method's config: the recipe's settings, then the options, then --set."""
    import yaml

    from mmgraft.cli.console import note
    from mmgraft.errors import UsageError
    from mmgraft.grafts.registry import get_method, moved

    fields = kind.config_class.model_fields
    values: dict[str, Any] = dict(recipe.graft.config) if recipe else {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in fields:
            raise UsageError(
                f"--{name.replace('_', '-')} is no setting of method {kind.name}; "
                f"leave it out, or see: mmgraft methods"
            )
        is_list = get_origin(fields[name].annotation) is list
        values[name] = value.split(",") if is_list else value
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write KEY=VALUE")
        values[key] = yaml.safe_load(text)
    name, values, note_ = moved(kind.name, values)
    if note_ is not None:
        note(note_)
    return get_method(name).config_class.parse(values, f"settings of method {name}")


def _projector(
    defaults: GraftDefaults | None, name: str | None, norm: bool | None
) -> ProjectorConfig:
    """The projector's settings: the recipe's where it names the same one, then the options."""
    from mmgraft.errors import UsageError
    from mmgraft.vision.projectors.configs import MlpConfig
    from mmgraft.vision.projectors.registry import find_projector

    config: ProjectorConfig = defaults.projector if defaults else MlpConfig()
    if name not in (None, config.kind):
        config = find_projector(name).config_class.parse({}, f"settings of projector {name}")
    if norm is None:
        return config
    if "norm" not in type(config).model_fields:
        raise UsageError(f"--projector-norm is no setting of projector {config.kind}; leave it out")
    return config.model_copy(update={"norm": norm})


def _template(spec: str | None) -> Any:
    from mmgraft.errors import UsageError
    from mmgraft.model.files.graft_file import TemplateChoice

    if spec in (None, "chat"):
        return None
    if spec == "plain":
        return TemplateChoice(kind="plain")
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UsageError(f"no template file {spec}; write chat, plain or the path of a jinja file")
    return TemplateChoice(kind="file", text=path.read_text(encoding="utf-8"))


def _report(summary: Any, folder: Path, json: bool) -> None:
    from dataclasses import asdict

    from mmgraft.cli.console import human_bytes, human_count, note, print_json, stdout, table

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
