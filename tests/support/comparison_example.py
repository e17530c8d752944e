"""A comparison's folder with made-up arms, for tests of the report: 40 questions about a colour."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmgraft.comparison.files import PHASES, PhaseRecord, write_phase
from mmgraft.comparison.spec import Comparison, dump_comparison
from mmgraft.evaluation.items.files import file_sha256, read_items, read_training_answers
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.metrics.scoring import (
    groups_of,
    measure_answers,
    measure_prior,
    scores_by_kind,
)
from mmgraft.model.files.graft_file import BaseReference
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import FOLDER, Results, SetResult
from report_example import example_run, laws_section, section, text_section, training_section

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230)}
SAID: dict[str, Callable[[Item, int], str]] = {
    "llava-full": lambda item, at: item.answers[0] if at % 8 else "green",
    "llava": lambda item, at: "red",
    "iaa": lambda item, at: item.answers[0],
}
"""Right seven times of eight or more, right by chance, and always right."""


def write_questions(folder: Path, count: int = 40) -> None:
    """`test.jsonl` and `train.jsonl` with a picture each, two kinds of question."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    lines: list[str] = []
    for number in range(count):
        name = draw.choice(sorted(COLOURS))
        Image.new("RGB", (24, 16), COLOURS[name]).save(folder / f"{number}.png")
        parts = [
            {"type": "image", "image": f"{number}.png"},
            {"type": "text", "text": "which colour is | it?"},
        ]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": name}]
        row = {"id": str(number), "messages": turns, "kind": ("near", "far")[number % 2]}
        lines.append(json.dumps(row))
    for name in ("test.jsonl", "train.jsonl"):
        (folder / name).write_text("\n".join(lines) + "\n")


def make_spec(data: Path, **more: Any) -> SetSpec:
    """The set of these questions."""
    return SetSpec.parse(
        {
            "name": "colours", "metric": "exact", "path": str(data / "test.jsonl"),
            "images": str(data), "train": str(data / "train.jsonl"), **more,
        },
        "colours",
    )  # fmt: skip


def keep_answers(
    run: Path, spec: SetSpec, items: Sequence[Item], answers: Sequence[str], name: str
) -> None:
    """Answers as an evaluation keeps them."""
    path = run / FOLDER / "predictions" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [{"mmgraft_predictions": 1}]
    rows += [
        {"id": item.id, "question": item.question, "answer": said}
        for item, said in reversed(list(zip(items, answers, strict=True)))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def vision_of(
    run: Path, spec: SetSpec, said: Callable[[Item, int], str], blind: str = "red"
) -> Results:
    """The section of an arm that answers so, its answers kept in the run."""
    items = read_items(spec)
    answers = [said(item, at) for at, item in enumerate(items)]
    keep_answers(run, spec, items, answers, spec.name)
    keep_answers(run, spec, items, [blind] * len(items), f"{spec.name}.no_image")
    measured = measure_answers(spec, items, answers)
    prior = measure_prior(spec, items, read_training_answers(spec))
    groups = groups_of(items)

    def scores(found: Any) -> Any:
        return {name: one.model_dump() for name, one in found.scores(groups).items()}

    one = SetResult(
        name=spec.name,
        metric=spec.metric,
        main=measured.main,
        file="test.jsonl",
        sha256=file_sha256(Path(str(spec.path))),
        items=len(items),
        scores=scores(measured),
        blind={
            "prior": scores(prior),
            "no_image": scores(measure_answers(spec, items, [blind] * len(items))),
        },
        kinds=scores_by_kind(measured, items),
        predictions=f"{FOLDER}/predictions/{spec.name}.jsonl",
    )
    return section("vision", [one])


def example_comparison(out: Path, arms: Sequence[str] = ("llava-full", "llava", "iaa")) -> Path:
    """A comparison of which these arms are done, and one more not begun."""
    data = out.parent / "questions"
    write_questions(data)
    spec = make_spec(data)
    comparison = Comparison.parse(
        {
            "name": "colours", "description": "Three ways to see a colour",
            "base": "acme/tiny-llama", "vision": "acme/tiny-clip",
            "arms": {
                **{name: {"recipe": "demo-llava", "description": f"as {name}"} for name in SAID},
                "late": {"recipe": "demo-wings", "description": "not begun"},
            },
            "evaluation": [
                spec.model_dump(mode="json"),
                {"name": "wiki", "metric": "perplexity", "path": "wiki.txt"},
            ],
        },
        "example",
    )  # fmt: skip
    out.mkdir(parents=True)
    (out / "comparison.yaml").write_text(dump_comparison(comparison))
    for place, name in enumerate(arms):
        add_arm(out, name, spec, seconds=1000.0 * (place + 1))
    return out


def add_arm(out: Path, name: str, spec: SetSpec, seconds: float = 1000.0) -> Path:
    """One arm, all its phases done."""
    run = out / "arms" / name
    trained = name == "llava-full"
    record: dict[str, Any] = {}
    if name.startswith("llava"):
        record = {"method": "llava", "config": {"method": "llava"}}
    if trained:
        record |= {"base": BaseReference(id="./base"), "base_trained": True}
    example_run(
        run, training_section(seconds), text_section(moved=trained), laws_section(), **record
    )
    vision = vision_of(run, spec, SAID[name])
    (run / FOLDER / "vision.json").write_text(vision.model_dump_json())
    for phase in PHASES:
        write_phase(run, PhaseRecord(phase=phase, done=True))
    return run
