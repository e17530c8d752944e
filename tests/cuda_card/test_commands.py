"""Commands on a make-believe card: what they print and measure is what they do on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretend_cuda import Card
from tiny_runs import COLOURS, make_parts, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wings graft, and a set of every metric beside it."""
    parts = make_parts(tmp_path_factory.mktemp("parts"))
    seen, facts = [], []
    for number in range(3):
        item = {"id": f"n{number}", "options": [*COLOURS], "answer": [*COLOURS][number]}
        seen.append({**item, "image": f"{number}.png", "question": "which colour?"})
        facts.append({**item, "question": f"what is {number}?"})
    for name, rows in (("seen", seen), ("facts", facts)):
        (parts / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (parts / "page.txt").write_text("A page of words that says very little about anything.")
    shown = {"path": str(parts / "seen.jsonl"), "images": str(parts / "images")}
    text = {"modality": "text", "path": str(parts / "facts.jsonl")}
    listed = [
        {"name": "seen", "metric": "exact", **shown, "max_new_tokens": 3},
        {"name": "chosen", "metric": "choice", **shown},
        {"name": "facts", "metric": "choice", **text},
        {"name": "page", "metric": "perplexity", "path": str(parts / "page.txt")},
    ]
    (parts / "sets.yaml").write_text(yaml.safe_dump({"evaluation": listed}))
    return make_run(parts, parts / "run", "wings")


def test_chat(cli: Any, card: Card, run: Path) -> None:
    image = run.parent / "images" / "0.png"
    said = ["chat", run, "what is it", "--image", image, "--max-new-tokens", "4"]
    there = cli(*said, "--device", "cuda")
    assert there.code == 0, there.err
    assert there.out == cli(*said, "--device", "cpu").out


def test_evaluation(cli: Any, card: Card, run: Path) -> None:
    scores = {}
    for device in ("cuda", "cpu"):
        asked = ["--text", "--vision", "--sets", run.parent / "sets.yaml", "--device", device]
        ran = cli("eval", run, *asked)
        assert ran.code == 0, ran.err
        for part in ("text", "vision"):
            found = json.loads((run / "results" / f"{part}.json").read_text())
            if part == "text":
                assert found["identity"]["identical"] is True
            scores[device, part] = {one["name"]: one["scores"] for one in found["sets"]}
    for part in ("text", "vision"):
        assert scores["cuda", part].keys() == scores["cpu", part].keys()
        for name, wanted in scores["cpu", part].items():
            for score, value in wanted.items():
                found = scores["cuda", part][name][score]["value"]
                assert found == pytest.approx(value["value"], rel=1e-4), (name, score)
