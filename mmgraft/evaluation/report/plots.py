"""Plots of measurements as PNG: attention by layer, and training curves. No display is needed.

The form of the first is that of Wings, arXiv 2406.03496, figure 2.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from mmgraft.errors import UsageError
from mmgraft.evaluation.report.about_run import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mmgraft.runs.results import Results

DPI = 110
PANEL = (3.6, 2.5)  # inches
SIDES = {  # curve: colour and label
    "before": ("#1f77b4", "text before the image"),
    "image": ("#7f7f7f", "the image"),
    "after": ("#e6761e", "text after the image"),
}
RUNS = ("#1f77b4", "#e6761e", "#2a9d5c", "#b2387f", "#7a5cc7", "#8a6d3b", "#17a2b8", "#666666")
DASHES = ("solid", "dashed", "dotted")  # of the first eight runs, of the next, of the rest
_WINDOWS = 25  # a curve's running mean is over a 25th of its steps
_Panel = tuple[str, Mapping[str, Any], str]


def laws_plot(results: "Mapping[str, Results]") -> bytes:
    """Plot attention by layer: a row of panels for each run, a panel for each series.

    A panel shows which share of a query's attention goes to the text before the image, to the
    image and to the text after it, and names the attention shift. Rings mark inserted layers.

    Args:
        results: Sections ``laws`` by the labels to show, such as names of runs; at least one.

    Returns:
        A PNG.

    Raises:
        UsageError: A section without curves.
    """
    panels = {label: _panels(label, found) for label, found in results.items()}
    columns = max(map(len, panels.values()))
    figure = _figure(columns, len(panels))
    grid: Any = figure.subplots(len(panels), columns, squeeze=False)
    curves = [curve for found in panels.values() for _, curve, _ in found]
    top = max(max(curve[side]) for curve in curves for side in SIDES)
    for row, (label, found) in zip(grid, panels.items(), strict=True):
        row[0].set_ylabel("share of attention", fontsize=8)
        for axes in row[len(found) :]:
            axes.set_axis_off()
        for axes, (name, curve, shift) in zip(row, found, strict=False):
            _draw_attention(axes, curve, top)
            axes.set_title(f"{label}: {name}\n{shift}", fontsize=8)
    lines, names = grid[0][0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": len(names)}
    figure.legend(lines, names, fontsize=8, frameon=False, **place)
    return _png(figure)


def _panels(label: str, results: "Results") -> list[_Panel]:
    """Return name, curves and shift of every series of a section."""
    found = []
    for one in results.sets:
        prefix = f"{one.name}, " if len(results.sets) > 1 else ""
        for name, curve in (results.details.get(one.name) or {}).get("series", {}).items():
            score = one.scores.get(f"shift_{name}")
            shift = f"shift {score.value:.3f}, {score.count:,} samples" if score else ""
            found.append((prefix + name.replace("_", " "), curve, shift))
    if not found:
        raise UsageError(f"{label} has no attention by layer; run `mmgraft laws` on it again")
    return found


def _draw_attention(axes: "Axes", curve: Mapping[str, Any], top: float) -> None:
    layers = list(curve["layers"])
    inserted = [position for position, layer in enumerate(layers) if "+" in layer]
    for side, (colour, label) in SIDES.items():
        axes.plot(curve[side], color=colour, linewidth=1.5, label=label)
        rings = [curve[side][position] for position in inserted]
        axes.plot(inserted, rings, "o", color=colour, markersize=4, markerfacecolor="white")
    step = math.ceil(len(layers) / 8)
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.set_ylim(0, top * 1.05)
    axes.set_xlabel("layer", fontsize=8)
    _style(axes)


def training_curves(
    metrics_files: Mapping[str, Path], repeats: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """Plot the loss by step of each training, one stage after another.

    Pale lines are the logged losses, strong ones their running mean; points are losses on held-out
    rows. A dotted line stands where a stage ends. Lines of the files that a kill cut short are
    skipped.

    Args:
        metrics_files: Files ``metrics.jsonl`` with losses by the labels to show, at least one.
        repeats: What a label repeats with another seed, such as ``{"a.seed1": "a"}``. Repeats have
            one colour and stand in the legend once.

    Returns:
        A PNG.
    """
    figure = _figure(2, 1.4)
    axes: Any = figure.subplots()
    shown: list[float] = []
    names: list[str] = []
    for label, path in metrics_files.items():
        name, stages = repeats.get(label, label), _stages(path)
        entry = None if name in names else name
        names += [entry] if entry else []
        number = names.index(name)
        colour, dashes = RUNS[number % len(RUNS)], DASHES[number // len(RUNS) % len(DASHES)]
        width = max(1, sum(len(stage.losses) for stage in stages) // _WINDOWS)
        for at, stage in enumerate(stages):
            smooth = _running_mean(stage.losses, width)
            axes.plot(stage.steps, stage.losses, color=colour, alpha=0.25, linewidth=0.8)
            line = {"color": colour, "linestyle": dashes, "linewidth": 1.6}
            axes.plot(stage.steps, smooth, label=None if at else entry, **line)
            axes.plot(*stage.held_out, "o", color=colour, markersize=3)
            shown += [*smooth, *stage.held_out[1]]
        for stage in stages[:-1]:
            axes.axvline(stage.end, color=colour, linestyle=":", linewidth=0.8)
    if min(shown) > 0 and max(shown) > 20 * min(shown):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0, top=max(shown) * 1.1)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("loss, nats a token", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    _style(axes)
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
    stages: list[_Stage] = []
    for line in read_metrics(path):
        if not isinstance(line.get("step"), int | float):
            continue
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
    return stages


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return each value's mean with those up to ``width - 1`` before it."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - width)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def _figure(columns: float, rows: float) -> "Figure":
    from matplotlib.figure import Figure

    width, height = PANEL
    figure = Figure((width * columns, height * rows + 0.4), dpi=DPI, layout="constrained")
    figure.patch.set_facecolor("white")
    return figure


def _style(axes: "Axes") -> None:
    axes.tick_params(labelsize=7)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: "Figure") -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
