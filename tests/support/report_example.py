"""A run folder with made-up results of every section, for tests of what is made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hub_fixtures import make_run
from mmgraft.runs.results import Results, Score, Section, SetResult, write_results

SHA = "c0ffee" + "0" * 58
SHAPES = ("T", "T,T", "T,T,T", "T,T,V", "T,V", "V")
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}

RECIPE = {
    "name": "small",
    "data": [{"path": "/home/someone/data/vqa.jsonl"}],
    "stages": [
        {"name": "align", "train": ["projector"], "lr": 1e-3, "max_steps": 80, "batch_size": 32,
         "data": [{"path": "captions.jsonl", "limit": 500}]},
        {"name": "tune", "train": ["projector", "layers"], "lr": 2e-4, "epochs": 1.0},
    ],
}  # fmt: skip


def score(value: float, half: float = 0.02, count: int = 1000) -> Score:
    """A score in the middle of its interval."""
    return Score(value=value, low=value - half, high=value + half, count=count)


def same() -> Score:
    """A difference that is none, whatever items are drawn."""
    return score(0.0, 0.0)


def a_set(name: str, metric: str, main: str, **more: Any) -> SetResult:
    """A set with what every set has."""
    values = {"file": f"{name}.jsonl", "sha256": SHA, "items": 1000, **more}
    return SetResult(name=name, metric=metric, main=main, **values)


def identity(identical: bool = True) -> dict[str, Any]:
    """As `IdentityReport.as_dict()` gives it."""
    return {
        "identical": identical,
        "max_difference": 0.0 if identical else 1.25,
        "first_difference": None if identical else "logits of prompts 1 to 4",
        "prompts": 8,
        "positions": 1234,
        "grafted": "aa11" * 16 if identical else "bb22" * 16,
        "base": "aa11" * 16,
        "base_trained": not identical,
        "base_fingerprint": "cc33" * 16,
        "graft_sha256": "dd44" * 16,
    }


def section(name: Section, sets: list[SetResult], **more: Any) -> Results:
    """A section with what every section has."""
    graft = {"method": "iaa", "workflow": "mm", "base": "acme/tiny-llama"}
    values = {"mmgraft_version": "0.2.0", "versions": VERSIONS, "graft": graft, **more}
    return Results(section=name, sets=sets, **values)


def text_section(moved: bool = False) -> Results:
    """Text that is the base's, or that a training has moved."""
    change = {"perplexity": score(3.1, 0.5), "kl_to_base": score(0.21, 0.01)} if moved else {
        "perplexity": same(), "kl_to_base": same(),
    }  # fmt: skip
    kl = score(0.21, 0.01) if moved else same()
    after = score(31.5, 0.9) if moved else score(28.4, 0.8)
    sets = [
        a_set(
            "wiki", "perplexity", "perplexity", items=20,
            scores={"perplexity": after, "kl_to_base": kl},
            base={"perplexity": score(28.4, 0.8)}, change=change,
        ),
        a_set(
            "mmlu", "choice", "accuracy",
            scores={"accuracy": score(0.27), "accuracy_per_token": score(0.29)},
            base={"accuracy": score(0.281), "accuracy_per_token": score(0.29)},
            change={"accuracy": score(-0.011, 0.02) if moved else same()},
            settings={"workflow": "text", "batch_size": 8, "normalised": True},
        ),
    ]  # fmt: skip
    return section("text", sets, identity=identity(not moved))


def vision_section(accuracy: float = 0.871) -> Results:
    """A set of questions with blind scores and kinds, and one of boxes."""
    return section("vision", [
        a_set(
            "easy-vqa", "exact", "accuracy", scores={"accuracy": score(accuracy)},
            blind={"prior": {"accuracy": score(0.67)}, "no_image": {"accuracy": score(0.61)}},
            kinds={"color": {"accuracy": score(0.95, count=300)},
                   "shape": {"accuracy": score(0.7, count=700)}},
        ),
        a_set(
            "stamps", "box", "precision_at_0.5",
            scores={"precision_at_0.5": score(0.41), "mean_iou": score(0.38)},
            blind={"no_image": {"precision_at_0.5": score(0.1)}},
        ),
    ])  # fmt: skip


def iit_section() -> Results:
    """The six shapes, scored twice, those with an image without it too."""
    shapes = [
        a_set(f"({shape})", "choice", "accuracy", items=120,
              scores={"accuracy": score(0.5 - place / 20, 0.09),
                      "accuracy_generated": score(0.44 - place / 20, 0.09)},
              blind={"no_image": {"accuracy": score(0.2)}} if "V" in shape else {})
        for place, shape in enumerate(SHAPES)
    ]  # fmt: skip
    alone = {"(T,T)": {"accuracy": score(-0.05, 0.02).model_dump()}}
    return section("iit", shapes, details={"against_the_question_alone": alone})


def laws_section(layers: int = 30) -> Results:
    """Curves over the layers for the base with the projector and for both sums of a graft."""

    def curves(phase: float) -> dict[str, list[Any]]:
        waves = [math.sin(layer / 5 + phase) / 10 for layer in range(layers)]
        return {
            "layers": [str(layer) for layer in range(layers)],
            "before": [0.3 + wave for wave in waves],
            "image": [0.4 - wave for wave in waves],
            "after": [0.3 + wave / 2 for wave in waves],
        }

    series = {"base_with_projector": curves(0), "base_layers": curves(1), "all_layers": curves(2)}
    one = a_set(
        "laws", "attention_shift", "shift_all_layers", items=48,
        scores={f"shift_{name}": score(0.5 - place / 10, 0.03, 48)
                for place, name in enumerate(series)},
        change={"shift_base_layers": score(-0.1, 0.02, 48), "shift_all_layers": score(-0.2, 0.3)},
    )  # fmt: skip
    details = {"samples": 50, "used": 48, "left_out": {"no_variance": 2}, "series": series}
    return section("laws", [one], details={"laws": details})


def training_section(seconds: float = 4000.0) -> Results:
    """Return what the training cost."""
    details = {
        "seconds": seconds,
        "cpu_seconds": 2 * seconds,
        "peak_memory_mb": 3115.8,
        "trained_parameters": 12352,
    }
    return section("training", [], details=details)


def write_metrics(run: Path, level: float = 1.0) -> None:
    """A training log of two stages whose last line a kill has cut."""
    lines = [
        json.dumps({"stage": stage, "step": step, "loss": level * 3 / (1 + step / 20)})
        for stage, steps in (("align", 80), ("tune", 300))
        for step in range(5, steps + 1, 5)
    ]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"stage": "tune", "st']))


def example_run(folder: Path, *sections: Results, **record: Any) -> Path:
    """A run folder with these sections; with all of them where none is given."""
    run = make_run(folder, recipe=RECIPE, **record)
    (run / "results.json").unlink()
    write_metrics(run)
    for one in sections or (
        training_section(), text_section(), vision_section(), iit_section(), laws_section()
    ):  # fmt: skip
        write_results(run, one)
    return run
