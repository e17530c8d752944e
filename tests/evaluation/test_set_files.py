from __future__ import annotations

from pathlib import Path

import pytest

from mmgraft.errors import UsageError
from mmgraft.evaluation.sets import choose_sets, given_set, load_sets, run_sets
from mmgraft.recipes.evaluation_set import SetSpec

SETS = """
evaluation:
  - {name: seen, metric: exact, path: seen.jsonl}
  - {name: facts, metric: choice, modality: text, path: mmlu, limit: 50}
"""
RECIPE = "name: r\nmethod: llava\nstages: [{name: s, train: [projector], lr: 1.0e-3}]\n"


def test_sets_stand_in_a_recipe_or_alone(tmp_path: Path) -> None:
    for text in (SETS, RECIPE + SETS):
        (tmp_path / "sets.yaml").write_text(text)
        found = load_sets(tmp_path / "sets.yaml")
        assert [(one.name, one.modality) for one in found] == [("seen", "image"), ("facts", "text")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (RECIPE, "names no set to evaluate on; write a list"),
        ("evaluation: [{name: a, metric: rouge}]", "metric"),
        ("evaluation: [{name: a, metric: exact, file: x}]", "'evaluation\\[0\\].file'"),
        ("evaluation: [{name: a, metric: box}]", "boxes: unit"),
        ("- a\n", "no settings"),
    ],
)
def test_a_file_that_names_no_set_aright_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "sets.yaml").write_text(text)
    with pytest.raises(UsageError, match=says):
        load_sets(tmp_path / "sets.yaml")
    with pytest.raises(UsageError, match=r"nowhere\.yaml"):
        load_sets(tmp_path / "nowhere.yaml")


def test_a_run_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    assert run_sets(tmp_path) == []
    (tmp_path / "recipe.yaml").write_text(RECIPE + SETS)
    assert [one.path for one in run_sets(tmp_path)] == ["seen.jsonl", "mmlu"]
    (tmp_path / "recipe.used.yaml").write_text(RECIPE + SETS.replace("seen.jsonl", "/a/seen.jsonl"))
    assert [one.path for one in run_sets(tmp_path)] == ["/a/seen.jsonl", "mmlu"]
    (tmp_path / "recipe.used.yaml").write_text(RECIPE)  # sets were added after training
    assert [one.path for one in run_sets(tmp_path)] == ["seen.jsonl", "mmlu"]


def test_some_sets_are_chosen_and_drawn_down(tmp_path: Path) -> None:
    (tmp_path / "sets.yaml").write_text(SETS)
    specs = load_sets(tmp_path / "sets.yaml")
    assert [one.limit for one in choose_sets(specs, limit=100)] == [100, 50]
    assert [one.limit for one in choose_sets(specs, limit=10)] == [10, 10]
    assert choose_sets(specs, ["facts"]) == [specs[1]]
    with pytest.raises(UsageError, match=r"'fact'.*facts"):
        choose_sets(specs, ["fact"])
    with pytest.raises(UsageError, match="two sets are called 'seen'"):
        choose_sets([*specs, specs[0]])


def test_one_set_is_named_by_its_file() -> None:
    found = given_set("data/test.v2.jsonl", "exact", images="photos", train=None, columns=None)
    assert found == SetSpec(name="test", path="data/test.v2.jsonl", metric="exact", images="photos")
    assert given_set("a.txt", "perplexity").modality == "text"
    assert given_set("a.csv", "choice", name="b", modality="text").name == "b"
    with pytest.raises(UsageError, match="--metric exact"):
        given_set("a.jsonl", None)
    with pytest.raises(UsageError, match="boxes: unit"):
        given_set("a.jsonl", "box")
    with pytest.raises(UsageError, match="metric"):
        given_set("a.jsonl", "bleu")
