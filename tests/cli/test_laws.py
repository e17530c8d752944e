"""`mmgraft laws`: from a run and its rows to JSON, a picture and a table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from hub_fixtures import contents
from mmgraft.runs.results import read_results


def add_sets(run: Path, *sets: dict) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "evaluation": list(sets)}))


def test_a_run_is_measured_and_told(cli, run: Path, parts: Path) -> None:
    rows = ["laws", "run", parts / "rows.jsonl", "--images", parts / "images"]
    ran = cli(*rows)
    assert ran.code == 0, ran.err
    results = read_results(run, "laws")
    assert results is not None
    (one,) = results.sets
    for name, score in one.scores.items():
        told = next(line for line in ran.out.splitlines() if line.startswith(
            name.removeprefix("shift_").replace("_", " ")))  # fmt: skip
        assert str(score) in told
        assert (name in one.change) == (" to " in told.replace(str(score), ""))
    assert "left out: 3 no image" in ran.err
    with Image.open(run / "results" / "laws.png") as picture:
        assert 900 < picture.width < 1600
        assert 250 < picture.height < 600
    again = cli(*rows, "--json")
    data = json.loads(again.out)
    assert data["details"] == results.details
    assert data["sets"][0]["scores"] == results.model_dump(mode="json")["sets"][0]["scores"]


def test_rows_are_drawn_by_a_seed(cli, run: Path, parts: Path, here: Path) -> None:
    rows = ["laws", "run", parts / "rows.jsonl", "--images", parts / "images", "--limit", "4"]
    found = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "5")):
        ran = cli(*rows, "--seed", seed, "--out", name, "--json")
        assert ran.code == 0, ran.err
        found[name] = json.loads(ran.out)["details"]["rows"]
        assert (here / name / "laws.json").is_file()
        assert (here / name / "laws.png").is_file()
    assert found["a"]["samples"] == 4
    assert found["a"] == found["b"] != found["c"]
    assert not (run / "results").exists()


def test_a_set_of_the_recipe_is_taken_where_no_file_is_named(cli, run: Path, parts: Path) -> None:
    lines = (parts / "rows.jsonl").read_text().splitlines()
    (run / "seen.jsonl").write_text("\n".join(line for line in lines if "image" in line))
    path, images = str(run / "seen.jsonl"), str(parts / "images")
    add_sets(
        run,
        {"name": "facts", "metric": "choice", "modality": "text", "path": path},
        {"name": "colours", "metric": "exact", "path": path, "images": images},
        {"name": "shades", "metric": "exact", "path": path, "images": images, "limit": 3},
    )
    first = json.loads(cli("laws", "run", "--json").out)
    assert [one["name"] for one in first["sets"]] == ["colours"]
    assert first["sets"][0]["items"] == 9
    ran = cli("laws", "run", "--set", "shades", "--json")
    assert json.loads(ran.out)["sets"][0]["items"] == 3


def test_a_dry_run_writes_nothing(cli, run: Path, parts: Path, here: Path) -> None:
    before = contents(here)
    ran = cli("laws", "run", parts / "rows.jsonl", "--images", parts / "images", "--dry-run")
    assert ran.code == 0, ran.err
    assert "would measure 12 rows" in ran.err
    assert "run/results/laws.json" in ran.err
    assert contents(here) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["nowhere.jsonl"], "no data file nowhere.jsonl"),
        (["rows.jsonl", "--set", "colours"], "not both"),
        ([], "names no set with images.*ROWS.jsonl"),
        (["rows.jsonl", "--out", "run/recipe.yaml"], "is a file; name a folder"),
        (["text.jsonl"], "leaves no sample to measure .1 no_image"),
    ],
)
def test_wrong_use_is_refused(refused, run: Path, here: Path, more: list[str], said: str) -> None:
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
    (here / "text.jsonl").write_text(json.dumps({"messages": turns}))
    assert re.search(said, refused("laws", "run", *more))


def test_wrong_names_are_refused(refused, run: Path, parts: Path) -> None:
    add_sets(
        run,
        {"name": "colours", "metric": "exact", "path": str(parts / "rows.jsonl")},
        {"name": "facts", "metric": "perplexity", "path": str(parts / "rows.jsonl")},
    )
    assert "did you mean 'colours'" in refused("laws", "run", "--set", "colors")
    assert "is of text alone; choose colours" in refused("laws", "run", "--set", "facts")
    asked = ["laws", "run", parts / "rows.jsonl", "--images", parts / "images"]
    assert "this model has: mm" in refused(*asked, "--workflow", "seeing")
    assert "neither a folder nor a Hub id" in refused("laws", "nowhere", *asked[2:])
    (run / "graft_config.json").unlink()
    assert "holds no graft_config.json" in refused(*asked, "--dry-run")
