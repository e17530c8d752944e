"""`mmgraft compare`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmgraft.comparison import runner
from mmgraft.comparison.plan import ComparisonPlan
from mmgraft.comparison.runner import Compared
from mmgraft.runs.results import read_results
from tiny_runs import make_parts

STAGE = {"name": "tune", "train": ["projector"], "lr": 1e-3, "batch_size": 4, "max_steps": 2}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_parts(tmp_path_factory.mktemp("parts"))
    asked = [
        {"image": f"{number}.png", "question": "which colour?", "answer": "red", "id": str(number)}
        for number in (0, 1, 2)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    return folder


@pytest.fixture
def here(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `mine.yaml`, a comparison of two learning rates, and a recipe."""
    recipe = {"name": "tiny", "method": "llava", "precision": "fp32", "stages": [STAGE]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**recipe, "log_every": 1}))
    comparison = {
        "name": "mine",
        "base": str(shared / "base"),
        "vision": {"id": str(shared / "tower")},
        "root": str(shared),
        "images": "images",
        "data": "rows.jsonl",
        "recipe": "tiny.yaml",
        "grid": {"stages.tune.lr": [0.001, 0.01]},
        "evaluation": [{"name": "colours", "metric": "exact", "path": "test.jsonl"}],
        "laws": {"path": "test.jsonl"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ComparisonPlan, dict[str, Any]]]:
    """Nothing is run; what was asked for is kept."""
    seen: list[tuple[ComparisonPlan, dict[str, Any]]] = []

    def compare(plan: ComparisonPlan, **options: Any) -> Compared:
        seen.append((plan, options))
        done = {arm.name: ["graft", "train"] for arm in plan.arms}
        return Compared(plan.out, done, [plan.out / "report.md"])

    monkeypatch.setattr(runner, "compare", compare)
    return seen


def test_dry_run_shows_the_plan_and_writes_nothing(cli, here, ran) -> None:
    before = sorted(here.rglob("*"))
    code, out, _ = cli(
        "compare", "mine.yaml", "--dry-run", "--set", "lr-0.01:stages.tune.max_steps=9"
    )
    assert code == 0
    assert "would compare 2 arms in compare-mine" in out
    assert "tune 2 x 4" in out
    assert "tune 9 x 4 (its own)" in out
    assert "budget of their own" in out
    packed = ["stages.tune.packing=true", "stages.tune.max_length=64", "stages.tune.max_steps=null"]
    sets = [word for one in packed for word in ("--set", one)]
    code, out, _ = cli("compare", "mine.yaml", "--dry-run", *sets)
    assert code == 0
    assert "tune 1 epoch of 9 rows, x 4 packed sequences" in " ".join(out.split())
    code, out, _ = cli("compare", "mine.yaml", "--dry-run", "--json", "--only", "lr-0.01")
    plan = json.loads(out)
    assert [arm["chosen"] for arm in plan["arms"]] == [False, True]
    (stage,) = plan["arms"][0]["stages"]
    assert (stage["rows"], stage["rows_a_step"], stage["steps"]) == (9, 4, 2)
    assert plan["evaluation"] == ["colours"]
    assert sorted(here.rglob("*")) == before
    assert not ran


def test_options_reach_the_comparison(cli, here, ran, shared) -> None:
    (here / "own.jsonl").write_text((shared / "rows.jsonl").read_text())
    code, out, err = cli(
        *("compare", "mine.yaml", "--out", "there", "--seed", "7", "--max-steps", "1"),
        *("--data", "tune=own.jsonl", "--images", shared / "images", "--limit", "2"),
        *("--set", "stages.tune.batch_size=3", "--set", "seed=8", "--batch-size", "5"),
        *("--train-only", "--device", "cpu"),
    )
    assert code == 0, err
    ((plan, options),) = ran
    assert plan.out == Path("there")
    for arm in plan.arms:
        assert arm.recipe.seed == 8  # --set comes last
        assert (arm.stages[0].steps, arm.stages[0].rows_a_step) == (1, 3)
        assert (arm.recipe.stages[0].data or [])[0].path == str(here / "own.jsonl")
    assert plan.comparison.evaluation[0].limit == 2
    assert options["train_only"] is True
    assert options["batch_size"] == 5
    assert "lr-0.001" in out
    assert "wrote there/report.md" in err


def test_base_and_tower_may_be_others(cli, here, ran, shared) -> None:
    text = (here / "mine.yaml").read_text().replace(str(shared / "base"), "nowhere")
    (here / "mine.yaml").write_text(text.replace("id: " + str(shared / "tower"), "id: nothing"))
    assert cli("compare", "mine.yaml").code == 2
    options = ("--base", shared / "base", "--vision", shared / "tower", "--root", shared)
    assert cli("compare", "mine.yaml", *options, "--seed", "3").code == 0
    plan, _ = ran[0]
    assert plan.base == str(shared / "base")
    assert plan.vision.id == str(shared / "tower")
    assert {arm.recipe.seed for arm in plan.arms} == {3}


def test_json_is_the_only_thing_on_stdout(cli, here, ran) -> None:
    code, out, _ = cli("compare", "mine.yaml", "--json")
    assert code == 0
    assert json.loads(out) == {
        "out": "compare-mine",
        "arms": [{"name": f"lr-{lr}", "done": ["graft", "train"]} for lr in ("0.001", "0.01")],
        "report": ["compare-mine/report.md"],
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["easy-vq"], "did you mean 'easy-vqa'"),
        (["iaa"], "no comparison 'iaa'"),
        (["gone.yaml"], "no comparison file gone.yaml"),
        (["tiny.yaml"], "is a recipe"),
        (["mine.yaml", "--only", "lr-1"], "no arm 'lr-1'"),
        (["mine.yaml", "--set", "lr-1:seed=1"], "no arm 'lr-1'"),
        (["mine.yaml", "--set", "stages.tune.lrr=1"], "did you mean 'lr'"),
        (["mine.yaml", "--data", "tunes=x.jsonl"], "did you mean 'tune'"),
        (["mine.yaml", "--data", "x.jsonl"], "x.jsonl"),
        (["mine.yaml", "--device", "tpu"], "cuda, mps, cpu"),
        (["mine.yaml", "--base", "nowhere"], "unknown model 'nowhere'"),
    ],
)
def test_wrong_use_is_code_2_and_says_what_to_do(cli, here, ran, arguments, says) -> None:
    code, _, err = cli("compare", *arguments)
    assert code == 2
    assert says in err
    assert not ran
    assert not list(here.glob("compare-*"))


@pytest.mark.slow
def test_a_whole_comparison_and_its_report(cli, here) -> None:
    code, out, err = cli("compare", "mine.yaml", "--device", "cpu", "--json")
    assert code == 0, err
    done = json.loads(out)
    phases = ["graft", "train", "text", "vision", "laws"]
    assert done["arms"] == [{"name": f"lr-{lr}", "done": phases} for lr in ("0.001", "0.01")]
    for arm in done["arms"]:
        run = here / "compare-mine/arms" / arm["name"]
        for section in ("training", "text", "vision", "laws"):
            assert read_results(run, section) is not None, section
        text = read_results(run, "text")
        assert text is not None
        assert text.identity is not None
        assert text.identity["identical"] is True
    files = {Path(path).name for path in done["report"]}
    assert files >= {"report.json", "report.md", "report.html"}
    assert "lr-0.01" in (here / "compare-mine/report.md").read_text()
