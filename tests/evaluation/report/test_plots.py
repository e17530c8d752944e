from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmgraft.errors import UsageError
from mmgraft.evaluation.report import plots
from mmgraft.evaluation.report.plots import laws_plot, training_curves
from mmgraft.runs.results import Results, Score, SetResult


def section(*series: str, layers: int = 4, level: float = 0.5) -> Results:
    score = Score(value=0.25, low=0.2, high=0.3, count=9)
    curve = {
        "layers": [str(layer) for layer in range(layers)],
        "before": [level] * layers,
        "image": [0.1] * layers,
        "after": [0.3] * layers,
    }
    one = SetResult(
        name="colours",
        metric="attention_shift",
        main=f"shift_{series[-1]}",
        file="rows.jsonl",
        sha256="0",
        items=9,
        scores={f"shift_{name}": score for name in series},
    )
    return Results(
        section="laws",
        mmgraft_version="0",
        sets=[one],
        details={"colours": {"series": {name: curve for name in series}}},
    )


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def inked(image: np.ndarray, colour: str) -> np.ndarray:
    """Find where an image has very nearly a colour such as #1f77b4."""
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return abs(image - wanted).max(-1) < 12


def test_a_panel_for_every_series_a_row_for_every_run() -> None:
    one = pixels(laws_plot({"LLaVA": section("base_with_projector")}))
    assert one.shape[0] > 250
    assert one.shape[1] > 350
    iaa = section("base_with_projector", "base_layers", "all_layers")
    wide = pixels(laws_plot({"IAA": iaa}))
    tall = pixels(laws_plot({"LLaVA": section("base_with_projector"), "IAA": iaa}))
    assert abs(wide.shape[1] - 3 * one.shape[1]) < 5
    assert tall.shape[1] == wide.shape[1]
    assert tall.shape[0] > 1.8 * wide.shape[0]
    for side in ("before", "image", "after"):
        assert inked(tall, plots.SIDES[side][0]).sum() > 500, side
    # the first row has one panel: nothing is drawn beside it
    assert (tall[:250, wide.shape[1] // 2 :] == 255).all()


def test_all_panels_have_one_scale() -> None:
    """The same share stands at the same height, whatever else its panel shows."""
    both = {"low": section("main", level=0.2), "high": section("main", level=0.9)}
    image = pixels(laws_plot(both))
    half = image.shape[0] // 2
    lines = inked(image, plots.SIDES["after"][0])  # 0.3 in both
    heights = []
    for part in (lines[:half], lines[half : image.shape[0] - 60]):
        heights.append(int(np.argmax(part.sum(1))))
    panels = inked(image, plots.SIDES["before"][0])
    top, bottom = panels[:half], panels[half : image.shape[0] - 60]
    # low (0.2) is under 0.3 in its own panel, high (0.9) above
    assert np.argmax(top.sum(1)) > heights[0]
    assert np.argmax(bottom.sum(1)) < heights[1]
    gap = (np.argmax(top.sum(1)) - heights[0], heights[1] - np.argmax(bottom.sum(1)))
    assert gap[1] / gap[0] == pytest.approx(6, rel=0.25)  # 0.6 against 0.1


def test_inserted_layers_are_marked() -> None:
    plain = section("all_layers")
    marked = section("all_layers")
    marked.details["colours"]["series"]["all_layers"]["layers"] = ["0", "1", "1+", "2"]
    difference = (pixels(laws_plot({"x": plain})) != pixels(laws_plot({"x": marked}))).any(-1)
    assert difference.sum() > 60


def test_a_section_without_curves_is_refused() -> None:
    empty = section("main")
    empty.details.clear()
    with pytest.raises(UsageError, match=r"IAA has no attention by layer.*mmgraft laws"):
        laws_plot({"IAA": empty})


# -- training -------------------------------------------------------------------------------------


def metrics(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def steps(stage: str, *losses: float) -> list[dict[str, Any]]:
    return [{"stage": stage, "step": at, "loss": x} for at, x in enumerate(losses, start=1)]


def test_steps_count_on_from_stage_to_stage(tmp_path: Path) -> None:
    path = metrics(
        tmp_path / "metrics.jsonl",
        *steps("align", 3.0, 2.0),
        {"stage": "align", "step": 2, "eval_loss": 2.5},
        *steps("tune", 5.0, 4.0, 1.0),
    )
    with path.open("a") as file:
        file.write('{"stage": "tune", "step": 4, "lo')  # a kill
    align, tune = plots._stages(path)
    assert (align.steps, align.losses, align.end) == ([1, 2], [3.0, 2.0], 2)
    assert align.held_out == ([2], [2.5])
    assert (tune.steps, tune.losses, tune.end) == ([3, 4, 5], [5.0, 4.0, 1.0], 5)


def test_the_running_mean_is_of_values_so_far() -> None:
    assert plots._running_mean([4, 0, 2, 6], 1) == [4, 0, 2, 6]
    assert plots._running_mean([4, 0, 2, 6], 2) == [4, 2, 1, 4]
    assert plots._running_mean([4, 0, 2, 6], 9) == [4, 2, 2, 3]


def test_a_line_for_every_training(tmp_path: Path) -> None:
    files = {
        name: metrics(
            tmp_path / f"{name}.jsonl", *steps("tune", *[start / n for n in range(1, 40)])
        )
        for name, start in (("IAA", 3.0), ("Wings", 2.0))
    }
    image = pixels(training_curves(files))
    assert image.shape[0] > 300
    assert image.shape[1] > 600
    assert inked(image, plots.RUNS[0]).sum() > 300
    assert inked(image, plots.RUNS[1]).sum() > 300
    assert inked(image, plots.RUNS[2]).sum() < 30
    assert training_curves(files) == training_curves(files)


def test_repeats_have_one_colour(tmp_path: Path) -> None:
    losses = [3.0 / n for n in range(1, 40)]
    files = {
        name: metrics(tmp_path / f"{name}.jsonl", *steps("tune", *losses))
        for name in ("a.seed0", "b.seed0", "a.seed1", "b.seed1")
    }
    image = pixels(training_curves(files, {name: name[0] for name in files}))
    assert inked(image, plots.RUNS[1]).sum() > 300
    assert inked(image, plots.RUNS[2]).sum() + inked(image, plots.RUNS[3]).sum() < 30
