"""`mmgraft eval` on tiny grafts: what it writes, what it shows, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_towers import picture

COLOURS = ["red", "green", "blue"]


@pytest.fixture
def sets(here: Path) -> Path:
    """Sets of six items, three of which show each a picture of its own, and a YAML of them."""
    (here / "pictures").mkdir()
    seen, facts = [], []
    for number in range(6):
        picture(20 + 10 * (number % 3), 30).save(here / "pictures" / f"{number % 3}.png")
        choice = {"id": f"n{number}", "options": COLOURS, "answer": COLOURS[number % 3]}
        asked = {"image": f"{number % 3}.png", "question": "which colour?" + "!" * number}
        seen.append({**choice, **asked, "kind": "ab"[number % 2]})
        facts.append({**choice, "question": f"what is {number}?"})
    for name, rows in (("seen", seen), ("facts", facts)):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "page.txt").write_text("A page of words that says very little about anything.")
    shown = {"path": "seen.jsonl", "images": "pictures", "train": "seen.jsonl"}
    listed = [
        {"name": "seen", "metric": "exact", **shown, "max_new_tokens": 4},
        {"name": "chosen", "metric": "choice", **shown},
        {"name": "facts", "metric": "choice", "modality": "text", "path": "facts.jsonl"},
        {"name": "page", "metric": "perplexity", "path": "page.txt"},
    ]
    (here / "sets.yaml").write_text(yaml.safe_dump({"evaluation": listed}))
    return here


def section(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "results" / f"{name}.json").read_text())


def test_text_and_vision_are_measured_and_reported(cli, run: Path, sets: Path) -> None:
    ran = cli("eval", run, "--text", "--vision", "--sets", "sets.yaml", "--batch-size", 4)
    assert ran.code == 0, ran.err
    text, vision = section(run, "text"), section(run, "vision")
    assert [one["name"] for one in text["sets"]] == ["facts", "page"]
    assert text["identity"]["identical"] is True
    assert [one["name"] for one in vision["sets"]] == ["seen", "chosen"]
    for one in vision["sets"]:
        assert set(one["blind"]) == {"prior", "no_image"}
    shown = f"{vision['sets'][0]['scores']['accuracy']['value']:.3f}"
    assert shown in ran.out
    assert "identical, bit for bit" in ran.out
    assert "no_image" in ran.out
    for name in ("report.json", "report.md", "report.html"):
        assert (run / "results" / name).is_file()
        assert name in ran.err
    assert "seen" in (run / "results" / "report.md").read_text()


def test_a_second_call_adds_its_set_and_asks_nothing_twice(cli, run: Path, sets: Path) -> None:
    first = ["--data", "seen.jsonl", "--metric", "exact", "--images", "pictures"]
    assert cli("eval", run, *first).code == 0
    before = (run / "results" / "predictions" / "seen.jsonl").read_bytes()
    ran = cli("eval", run, *first, "--name", "again")
    assert ran.code == 0, ran.err
    assert "no training rows" in ran.err
    assert [one["name"] for one in section(run, "vision")["sets"]] == ["seen", "again"]
    ran = cli("eval", run, *first, "--json")
    assert "6 of 6 answers are in seen.jsonl" in ran.err
    assert (run / "results" / "predictions" / "seen.jsonl").read_bytes() == before
    printed = json.loads(ran.out)
    assert [one["name"] for one in printed["sections"]["vision"]["sets"]] == ["seen"]
    assert Path(printed["report"]["html"]).is_file()


def test_dialogues_are_built_and_scored(cli, run: Path, sets: Path) -> None:
    """Ask short questions: the tiny base reads 128 positions, and a dialogue has three of them."""
    for name, shown in (("seen", {"image": "0.png"}), ("facts", {})):
        rows = [
            {"id": str(n), "question": f"{n}?", "options": ["x", "y"], "answer": "x", **shown}
            for n in range(6)
        ]
        (sets / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = cli("eval", run, "--iit", "--sets", "sets.yaml", "--dialogue-count", 2)
    assert ran.code == 0, ran.err
    shapes = {one["name"]: one["items"] for one in section(run, "iit")["sets"]}
    assert len(shapes) == 6, ran.err
    assert set(shapes.values()) == {2}
    assert (run / "results" / "iit" / "dialogues.jsonl").is_file()


def test_a_dry_run_says_what_and_writes_nothing(cli, run: Path, sets: Path) -> None:
    asked = ["eval", run, "--text", "--vision", "--sets", "sets.yaml", "--limit", 2, "--dry-run"]
    ran = cli(*asked)
    assert ran.code == 0, ran.err
    assert "seen (exact, 2 items)" in ran.err
    assert "identity, facts (choice, 2 items)" in ran.err
    plan = json.loads(cli(*asked, "--json").out)["measures"]
    assert plan["vision"] == ["seen (exact, 2 items)", "chosen (choice, 2 items)"]
    assert not (run / "results").exists()


def test_the_sets_of_the_runs_recipe_are_asked(cli, run: Path, sets: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    listed = yaml.safe_load((sets / "sets.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **listed}))
    ran = cli("eval", run, "--vision", "--only", "chosen", "--dry-run")
    assert ran.err.strip().endswith("vision: chosen (choice, 6 items)")


def test_a_set_by_itself_is_of_text_where_its_metric_or_flag_says_so(
    cli, run: Path, sets: Path
) -> None:
    page = cli("eval", run, "--data", "page.txt", "--metric", "perplexity", "--dry-run")
    assert "text: identity, page (perplexity, 1 items)" in page.err
    facts = ["--data", "facts.jsonl", "--metric", "choice"]
    assert "facts (choice, 6 items)" in cli("eval", run, *facts, "--text", "--dry-run").err
    assert "no item has an image" in cli("eval", run, *facts, "--dry-run").err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--text, --vision"),
        (["--vision"], "--data FILE"),
        (["--vision", "--sets", "nowhere.yaml"], "nowhere.yaml"),
        (["--vision", "--sets", "sets.yaml", "--only", "sean"], "seen"),
        (["--data", "seen.jsonl"], "--metric exact"),
        (["--metric", "exact", "--vision"], "--data FILE"),
        (["--data", "seen.jsonl", "--metric", "bleu"], "yes_no"),
        (["--data", "seen.jsonl", "--metric", "box"], "boxes: unit"),
        (["--data", "seen.jsonl", "--metric", "exact", "--sets", "sets.yaml"], "one of them"),
        (["--data", "seen.jsonl", "--metric", "exact"], "seen.jsonl, line 1"),
        (["--data", "seen.jsonl", "--metric", "exact", "--column", "answer"], "FIELD=KEY"),
        (["--data", "seen.jsonl", "--metric", "exact", "--column", "answer=lable",
          "--images", "pictures"], "lable"),
        (["--data", "seen.jsonl", "--metric", "yes_no", "--images", "pictures"], "line 1"),
        (["--data", "empty.jsonl", "--metric", "exact"], "empty.jsonl"),
        (["--vision", "--sets", "sets.yaml", "--workflow", "grounding"], "this graft has: mm"),
        (["--vision", "--sets", "sets.yaml", "--workflow", "text"], "cannot see"),
        (["--iit"], "metric choice"),
        (["--iit", "--data", "pink.jsonl", "--metric", "choice", "--images", "pictures"],
         "pink.jsonl, line 1"),
        (["--iit", "--dialogues", "nowhere"], "no dialogues in nowhere"),
        (["--iit", "--sets", "sets.yaml", "--workflow", "grounding"], "this graft has: mm"),
        (["--text", "--sets", "sets.yaml", "--harness", "helaswag"], "hellaswag"),
        (["--text", "--dtype", "int8"], "bfloat16"),
        (["--text", "--device", "tpu"], "cpu"),
    ],
)  # fmt: skip
def test_mistakes_write_nothing(
    refused, run: Path, sets: Path, arguments: list[str], says: str
) -> None:
    (sets / "empty.jsonl").write_text("")
    pink = {"image": "0.png", "question": "?", "options": COLOURS, "answer": "pink"}
    (sets / "pink.jsonl").write_text(json.dumps(pink))
    assert says in refused("eval", run, *arguments)
    if says != "bfloat16" and says != "cpu":
        assert says in refused("eval", run, *arguments, "--dry-run"), "found before a model loads"


def test_a_broken_picture_is_found_before_a_question_is_asked(
    refused, run: Path, sets: Path
) -> None:
    (sets / "pictures" / "2.png").write_bytes(b"no picture")
    said = refused("eval", run, "--vision", "--sets", "sets.yaml", "--only", "seen")
    assert "seen.jsonl, line 3" in said
