"""``mmgraft estimate``."""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from mmgraft.cli.console import human_count, print_json, stdout, table
from mmgraft.cli.options import JsonFlag, ReadOption, argument, given, with_options
from mmgraft.errors import UsageError

if TYPE_CHECKING:
    from mmgraft.training.memory.estimate import Estimator

_OF_SEVERAL = ("of others, for a moment",)
_plan = partial(given, panel="What is trained")
_rows = partial(given, panel="Length of rows")
_SET = "Change a value: stages.*.batch_size=2, graft.config.layers=last:8."
_PROCESSES = "Number of processes that train together; sizes are those of one of them."

#: Options that ``read_request`` takes by these names.
_REQUEST = {
    "base": _plan(str, "Base: alias, Hub id or folder."),
    "vision": _plan(str, "Tower: Hub id, folder or name."),
    "recipe": _plan(str, "Recipe instead of the run's own."),
    "overrides": _plan(list[str], "--set", _SET),
    "length": _rows(int, "Positions of a row, images included.", min=2),
    "data": _rows(list[str], "Rows to measure: FILE, or STAGE=FILE."),
    "images": _rows(str, "Folder that image paths start from."),
    "read": (ReadOption, None),
    "device": given(str, "Device of the training: cuda or cpu.", default="cuda"),
    "processes": given(int, _PROCESSES, default=1, min=1),
}
_Target = Annotated[str, argument("Shipped name, YAML file, or a graft.", metavar="RECIPE|RUN")]


@with_options("json", _REQUEST)
def estimate(target: _Target, json: JsonFlag = False, **request: Any) -> None:
    """Say what memory a training takes, stage by stage, before anything is loaded.

    Every step of the real code runs on shapes alone: of base and tower only configs are read.
    """
    if (device := request["device"]) not in ("cuda", "cpu"):
        raise UsageError(f"--device {device}: write cuda or cpu")
    # Everything below loads torch.
    from mmgraft.training.memory.request import read_request

    found = _found(read_request(target, **request))
    if json:
        print_json(found)
    else:
        _show(found)


def _found(estimator: "Estimator") -> dict[str, Any]:
    from mmgraft.training.memory.estimate import not_counted
    from mmgraft.training.memory.shortage import peak_of, reserve, savings, smallest

    recipe, subject = estimator.recipe, estimator.subject
    stages = estimator.stages()
    card = smallest(peak_of(stages))
    files, record = subject.files, subject.record
    return {
        "recipe": recipe.name,
        "method": recipe.method,
        "base": record.base.id if files.id.startswith("./") else files.id,
        "tower": subject.vision.name,
        "device": estimator.device,
        "quantization": recipe.quantization,
        "processes": estimator.processes,
        "parallel": recipe.parallel,
        "stages": [asdict(stage) for stage in stages],
        "peak": peak_of(stages),
        "reserve": reserve(),
        "card": None if card is None else {"gb": card.gb, "such_as": card.such_as},
        "savings": [asdict(one) for one in savings(estimator)],
        "not_counted": not_counted(recipe, estimator.device, estimator.processes),
    }


def _show(found: dict[str, Any]) -> None:
    out, stages, several = stdout(), found["stages"], found["processes"] > 1
    lines = [
        f"{found['recipe']} ({found['method']}) on {found['base']}, seen with {found['tower']}"
    ]
    if several:
        lines.append(f"each of {found['processes']} processes, parallel: {found['parallel']}")
    for line in lines:
        out.print(line, markup=False)
    columns = [_lines(stage) for stage in stages]
    labels = [label for label in columns[0] if several or label not in _OF_SEVERAL]
    rows = [[label, *(column[label] for column in columns)] for label in labels]
    out.print(table(["", *(stage["stage"] for stage in stages)], rows))
    if found["device"] == "cuda":
        card = found["card"]
        enough = "no card of the list" if card is None else f"{card['gb']} GB ({card['such_as']})"
        enough += ", for each process" if several and card is not None else ""
        out.print(f"enough: {enough}; {found['reserve']} are left free", markup=False)
    elif several:
        out.print(f"in all {_gb(found['processes'] * found['peak'])} of main memory", markup=False)
    if found["savings"]:
        rows = [[one["write"], _gb(one["saves"]), one["costs"]] for one in found["savings"]]
        out.print(table(["to save, write", "saves", "it costs"], rows))
    for text in found["not_counted"]:
        out.print(f"not counted: {text}", markup=False)


def _lines(stage: dict[str, Any]) -> dict[str, Any]:
    """Build a stage's column of the table: what stands beside each label."""
    layers = stage["layers"]
    return {
        "rows at once": stage["batch_size"],
        "positions a row": "{length} ({source})".format(**stage["rows"]),
        "parameters": human_count(stage["parameters"]),
        "trained": human_count(stage["trained"]),
        "weights": " + ".join(f"{_gb(size)} {kind}" for kind, size in stage["weights"].items()),
        "vision tower": _gb(stage["tower"]),
        "  while it runs": _gb(stage["seeing"]),
        "optimizer": _gb(stage["optimizer"]),
        "gradients": _gb(stage["gradients"]),
        "of others, for a moment": _gb(stage["gathered"]),
        "activations": _gb(stage["activations"]),
        "  of a layer": _gb(round(sum(layers) / len(layers))) if layers else "",
        "peak": _gb(stage["peak"]),
        "  reached in": stage["moment"],
    }


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
