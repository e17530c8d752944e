from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmgraft.errors import UsageError
from mmgraft.runs.results import (
    Results,
    Score,
    SetResult,
    put_all_aside,
    put_aside,
    read_results,
    results_file,
    save_sets,
)


def a_set(name: str, value: float = 0.5) -> SetResult:
    score = Score(value=value, low=value, high=value, count=1)
    return SetResult(
        name=name, metric="exact", main="accuracy", file="f", sha256="s", items=1,
        scores={"accuracy": score},
    )  # fmt: skip


def section(*sets: SetResult, sha256: str = "a", **more: Any) -> Results:
    values: dict[str, Any] = {"section": "text", "mmgraft_version": "1"}
    values |= {"graft": {"sha256": sha256}, **more}
    return Results(sets=list(sets), **values)


def read(run: Path) -> Results:
    found = read_results(run, "text")
    assert found is not None
    return found


def test_a_set_measured_anew_takes_its_place_among_the_others(tmp_path: Path) -> None:
    save_sets(tmp_path, section(a_set("one"), a_set("two"), identity={"identical": True}))
    save_sets(tmp_path, section(a_set("three"), a_set("one", 0.9), versions={"lm-eval": "1"}))
    found = read(tmp_path)
    assert [(one.name, one.scores["accuracy"].value) for one in found.sets] == [
        ("one", 0.9),
        ("two", 0.5),
        ("three", 0.5),
    ]
    assert found.identity == {"identical": True}, "tasks of the harness prove nothing anew"
    assert found.versions == {"lm-eval": "1"}


def test_nothing_of_another_graft_is_kept(tmp_path: Path) -> None:
    save_sets(tmp_path, section(a_set("one"), identity={"identical": True}))
    save_sets(tmp_path, section(a_set("two"), sha256="b"))
    assert [one.name for one in read(tmp_path).sets] == ["two"]
    assert read(tmp_path).identity is None


def test_a_damaged_section_is_not_written_over_unsaid(tmp_path: Path) -> None:
    path = results_file(tmp_path, "text")
    path.parent.mkdir()
    path.write_text('{"schema_version": 1, "sect')
    with pytest.raises(UsageError, match="damaged"):
        save_sets(tmp_path, section(a_set("one")))
    assert path.read_text().endswith('"sect')


def test_a_task_of_the_harness_and_a_set_of_one_name_both_stay(tmp_path: Path) -> None:
    task = a_set("piqa", 0.7).model_copy(update={"settings": {"harness": "lm-eval 0"}})
    save_sets(tmp_path, section(a_set("piqa", 0.5)))
    save_sets(tmp_path, section(task))
    save_sets(tmp_path, section(a_set("piqa", 0.6)))
    assert [one.scores["accuracy"].value for one in read(tmp_path).sets] == [0.6, 0.7]


def test_other_sections_of_weights_that_are_gone_are_put_aside(tmp_path: Path) -> None:
    """Else a report after more training has the proof of before beside the answers of now."""
    save_sets(tmp_path, section(a_set("old")))
    training = section(section="training", graft={"method": "iaa"})
    save_sets(tmp_path, training)
    now = section(a_set("new"), section="vision", sha256="b")
    (aside,) = put_aside(tmp_path, now)
    assert aside.name == "text.stale-1.old"
    assert Results.model_validate_json(aside.read_text()).sets[0].name == "old"
    assert read_results(tmp_path, "text") is None
    assert read_results(tmp_path, "training") is not None, "it names no weights"
    save_sets(tmp_path, now)
    assert put_aside(tmp_path, now) == []


def test_before_a_training_every_section_steps_aside_and_the_report_goes(tmp_path: Path) -> None:
    save_sets(tmp_path, section(a_set("one"), section="vision"))
    (tmp_path / "results" / "report.md").write_text("the old graft's")
    (aside,) = put_all_aside(tmp_path)
    assert aside.name == "vision.stale-1.old"
    assert [path.name for path in (tmp_path / "results").iterdir()] == [aside.name]
    assert put_all_aside(tmp_path) == []
