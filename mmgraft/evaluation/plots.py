"""Pictures of measurements, as PNG: attention by layer, and training curves. No display is needed.

Source of the first one's form: Wings, arXiv 2406.03496, figure 2.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mmgraft.evaluation.results import Results

DPI = 110
PANEL = (3.6, 2.5)  # inches
COLOURS = {"before": "#1f77b4", "image": "#7f7f7f", "after": "#e6761e"}
ARMS = ("#1f77b4", "#e6761e", "#2a9d5c", "#b2387f", "#7a5cc7", "#8a6d3b", "#17a2b8", "#666666")
_SMOOTH = 25  # a curve is drawn as the running mean over a 25th of its steps


# -- attention by layer -------------------------------------------------------------------------


def laws_plot(results: Mapping[str, Results]) -> bytes:
    """Attention by layer: a row of panels for each result, a panel for each series.

    A panel shows what share of a query's attention goes to the text before the image, to the image
    and to the text after it, and names the attention shift. Rings mark inserted layers.

    Args:
        results: Sections ``laws`` by the labels to show, such as names of runs.

    Returns:
        A PNG.

    Raises:
        UsageError: A section without curves.
    """
    panels = {label: _panels(label, found) for label, found in results.items()}
    if not panels:
        raise UsageError("no attention was measured; run `mmgraft laws RUN` first")
    columns = max(len(found) for found in panels.values())
    figure = _figure(columns, len(panels))
    grid: Any = figure.subplots(len(panels), columns, squeeze=False)
    top = max(
        max(max(curve[side]) for side in COLOURS)
        for found in panels.values()
        for _, curve, _ in found
    )
    for row, (label, found) in enumerate(panels.items()):
        for column, axes in enumerate(grid[row]):
            if column >= len(found):
                axes.set_axis_off()
                continue
            name, curve, told = found[column]
            _laws_panel(axes, curve, top)
            axes.set_title(f"{label}: {name}\n{told}", fontsize=8)
            if column == 0:
                axes.set_ylabel("share of attention", fontsize=8)
    lines, names = grid[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), fontsize=8,
                  frameon=False)  # fmt: skip
    return _png(figure)


def _panels(label: str, results: Results) -> list[tuple[str, Mapping[str, Any], str]]:
    """Name, curves and shift of every series of a section."""
    found = []
    for one in results.sets:
        detail = results.details.get(one.name) or {}
        for name, curve in (detail.get("series") or {}).items():
            score = one.scores.get(f"shift_{name}")
            told = "" if score is None else f"shift {score.value:.3f}, {score.count:,} samples"
            prefix = f"{one.name}, " if len(results.sets) > 1 else ""
            found.append((prefix + name.replace("_", " "), curve, told))
    if not found:
        raise UsageError(f"{label} has no attention by layer; run `mmgraft laws` on it again")
    return found


def _laws_panel(axes: Axes, curve: Mapping[str, Any], top: float) -> None:
    layers = list(curve["layers"])
    places = list(range(len(layers)))
    inserted = [place for place, layer in zip(places, layers, strict=True) if "+" in layer]
    for side, colour in COLOURS.items():
        text = "the image" if side == "image" else f"text {side} the image"
        axes.plot(places, curve[side], color=colour, linewidth=1.5, label=text)
        at = [curve[side][place] for place in inserted]
        axes.plot(inserted, at, "o", color=colour, markersize=4, markerfacecolor="white")
    step = math.ceil(len(layers) / 8)
    axes.set_xticks(places[::step], layers[::step])
    axes.set_ylim(0, top * 1.05)
    axes.set_xlabel("layer", fontsize=8)
    _plain(axes)


# -- training -----------------------------------------------------------------------------------


def training_curves(metrics_files: Mapping[str, Path]) -> bytes:
    """Loss by step of each training, one stage after another.

    Pale lines are the logged losses, strong ones their running mean; points are losses on rows held
    out. A dotted line stands where a stage ends. Lines that a kill cut short are passed over.

    Args:
        metrics_files: Files ``metrics.jsonl`` by the labels to show.

    Returns:
        A PNG.

    Raises:
        UsageError: A file that is not there, or holds no loss.
    """
    if not metrics_files:
        raise UsageError("no training to draw; give at least one metrics.jsonl")
    figure = _figure(2, 1.4)
    axes: Any = figure.subplots()
    lowest, highest = math.inf, -math.inf
    for number, (label, path) in enumerate(metrics_files.items()):
        colour, stages = ARMS[number % len(ARMS)], _stages(path)
        width = max(1, sum(len(stage.losses) for stage in stages) // _SMOOTH)
        for stage in stages:
            smooth = _running_mean(stage.losses, width)
            axes.plot(stage.steps, stage.losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(stage.steps, smooth, color=colour, linewidth=1.6, label=label)
            axes.plot(*stage.held_out, "o", color=colour, markersize=3)
            lowest = min([lowest, *smooth, *stage.held_out[1]])
            highest = max([highest, *smooth, *stage.held_out[1]])
            label = None  # one line of the legend a training
        for stage in stages[:-1]:
            axes.axvline(stage.end, color=colour, linestyle=":", linewidth=0.8)
    if lowest > 0 and highest > 20 * lowest:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0, top=highest * 1.1)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("loss, nats a token", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)
    return _png(figure)


@dataclass
class _Stage:
    """Losses of one stage by step; steps count on from the stage before."""

    name: str
    start: float
    end: float
    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held_out: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))


def _stages(path: Path) -> list[_Stage]:
    if not path.is_file():
        raise UsageError(f"there is no {path}; train first, or name another metrics.jsonl")
    stages: list[_Stage] = []
    for line in _lines(path):
        name = str(line.get("stage"))
        if not stages or stages[-1].name != name:
            start = stages[-1].end if stages else 0.0
            stages.append(_Stage(name, start, start))
        stage = stages[-1]
        stage.end = stage.start + line["step"]
        if isinstance(line.get("loss"), int | float):
            stage.steps.append(stage.end)
            stage.losses.append(line["loss"])
        elif isinstance(line.get("eval_loss"), int | float):
            stage.held_out[0].append(stage.end)
            stage.held_out[1].append(line["eval_loss"])
    if not any(stage.losses for stage in stages):
        raise UsageError(f"{path} holds no loss; train first, or name another metrics.jsonl")
    return stages


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int | float):
            yield line


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Each value's mean with those up to ``width - 1`` before it."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, end - width) for end in range(1, len(sums))]
    return [
        (sums[end] - sums[start]) / (end - start)
        for end, start in zip(range(1, len(sums)), starts, strict=True)
    ]


# -- pictures -----------------------------------------------------------------------------------


def _figure(columns: float, rows: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = PANEL
    figure = Figure((width * columns, height * rows + 0.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_facecolor("white")
    return figure


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=7)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
