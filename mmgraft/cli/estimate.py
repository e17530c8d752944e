"""`mmgraft estimate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmgraft.cli.options import JsonFlag

if TYPE_CHECKING:
    from mmgraft.training.memory.request import Request
    from mmgraft.training.memory.switches import Fit, Saving

_PLAN, _ROWS = "What is trained", "Length of rows"
_OF_SEVERAL = ("of others, for a moment", "to exchange")


def estimate(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="Shipped name, YAML file, or a graft.")
    ],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Alias, Hub id or folder.", rich_help_panel=_PLAN),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option("--vision", help="Hub id, folder or registered tower.", rich_help_panel=_PLAN),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Of a run, instead of its own.", rich_help_panel=_PLAN),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a value: stages.*.batch_size=2, graft.config.layers=last:8.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length", min=2, help="Positions of a row, images counted.", rich_help_panel=_ROWS
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", help="FILE or STAGE=FILE, to measure rows in.", rich_help_panel=_ROWS
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option("--images", help="Folder that image paths start from.", rich_help_panel=_ROWS),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="cuda or cpu: where it would train.")
    ] = "cuda",
    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            min=1,
            help="So many train together, as the recipe's parallel says; of each of them.",
        ),
    ] = 1,
    json: JsonFlag = False,
) -> None:
    """Say what memory a training takes, stage by stage, before anything is loaded.

    Every step of the real code runs on shapes alone: of base and tower only configs are read.
    """
    from mmgraft.errors import UsageError

    if device not in ("cuda", "cpu"):
        raise UsageError(f"--device {device}: write cuda or cpu")
    # Everything below loads torch.
    from mmgraft.cli.console import print_json
    from mmgraft.training.memory.request import read_request

    request = read_request(
        target,
        recipe=recipe,
        base=base,
        vision=vision,
        data=data or (),
        images=images,
        overrides=set_ or (),
        length=length,
        device=device,
        processes=processes,
    )
    found = _found(request)
    if json:
        print_json(found)
    else:
        _show(found)


def _found(request: Request) -> dict[str, Any]:
    from mmgraft.training.memory.cards import reserve, smallest
    from mmgraft.training.memory.limits import not_counted
    from mmgraft.training.memory.switches import peak_of, savings, smaller_cards

    estimator = request.estimator()
    stages = estimator.stages(request.recipe)
    peak = peak_of(stages)
    card = smallest(peak)
    on_cards = request.device == "cuda"
    return {
        "recipe": request.recipe.name,
        "method": request.recipe.method,
        "base": request.subject.record.base.id if request.subject.files.id.startswith("./")
        else request.subject.files.id,
        "tower": request.subject.vision.name,
        "device": request.device,
        "quantization": request.recipe.quantization,
        "processes": request.processes,
        "parallel": request.recipe.parallel,
        "stages": [asdict(stage) for stage in stages],
        "peak": peak,
        "reserve": reserve(),
        "card": None if card is None else {"gb": card.gb, "such_as": card.such_as},
        "savings": [_saving(one) for one in savings(estimator, request.recipe)],
        "smaller_cards": [_fit(one) for one in smaller_cards(estimator, request.recipe)]
        if on_cards
        else [],
        "not_counted": not_counted(request.recipe, request.device, request.processes),
    }  # fmt: skip


def _saving(one: Saving) -> dict[str, Any]:
    return asdict(one)


def _fit(one: Fit) -> dict[str, Any]:
    return {"gb": one.card.gb, "such_as": one.card.such_as, "write": one.write, "peak": one.peak}


def _show(found: dict[str, Any]) -> None:
    from mmgraft.cli.console import human_count, stdout, table

    out = stdout()
    out.print(
        f"{found['recipe']} ({found['method']}) on {found['base']}, seen with {found['tower']}",
        markup=False,
    )
    stages = found["stages"]
    parts: list[list[Any]] = [
        ["rows at once", *(stage["batch_size"] for stage in stages)],
        ["positions a row", *(_row(stage["rows"]) for stage in stages)],
        ["parameters", *(human_count(stage["parameters"]) for stage in stages)],
        ["trained", *(human_count(stage["trained"]) for stage in stages)],
        ["weights", *(_weights(stage["weights"]) for stage in stages)],
        ["vision tower", *(_gb(stage["tower"]) for stage in stages)],
        ["  while it runs", *(_gb(stage["seeing"]) for stage in stages)],
        ["optimizer", *(_gb(stage["optimizer"]) for stage in stages)],
        ["gradients", *(_gb(stage["gradients"]) for stage in stages)],
        ["of others, for a moment", *(_gb(stage["gathered"]) for stage in stages)],
        ["to exchange", *(_gb(stage["buffers"]) for stage in stages)],
        ["kernels", *(_gb(stage["kernels"]) for stage in stages)],
        ["activations", *(_gb(stage["activations"]) for stage in stages)],
        ["  of a layer", *(_layer(stage["layers"]) for stage in stages)],
        ["peak", *(_gb(stage["peak"]) for stage in stages)],
        ["  reached in", *(stage["moment"] for stage in stages)],
    ]
    several = found["processes"] > 1
    if not any(stage["kernels"] for stage in stages):
        parts = [part for part in parts if part[0] != "kernels"]
    if not several:
        parts = [part for part in parts if part[0] not in _OF_SEVERAL]
    else:
        each = f"each of {found['processes']} processes, parallel: {found['parallel']}"
        out.print(each, markup=False)
    out.print(table(["", *(stage["stage"] for stage in stages)], parts))
    if found["device"] == "cuda":
        card = found["card"]
        enough = "no card of the list" if card is None else _card(card)
        enough += ", for each process" if several and card is not None else ""
        out.print(f"enough: {enough}; {found['reserve']} are left free", markup=False)
    elif several:
        out.print(f"in all {_gb(found['processes'] * found['peak'])} of main memory", markup=False)
    if found["savings"]:
        rows = [[one["write"], _gb(one["saves"]), one["costs"]] for one in found["savings"]]
        out.print(table(["to save, write", "saves", "it costs"], rows))
    for fit in found["smaller_cards"]:
        out.print(f"for {_card(fit)}: {'; '.join(fit['write'])} ({_gb(fit['peak'])})", markup=False)
    for text in found["not_counted"]:
        out.print(f"not counted: {text}", markup=False)


def _row(rows: dict[str, Any]) -> str:
    return f"{rows['length']} ({rows['source']})"


def _weights(weights: dict[str, int]) -> str:
    return " + ".join(f"{_gb(size)} {name}" for name, size in weights.items())


def _layer(layers: list[int]) -> str:
    return _gb(round(sum(layers) / len(layers))) if layers else ""


def _card(card: dict[str, Any]) -> str:
    return f"{card['gb']} GB ({card['such_as']})"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
