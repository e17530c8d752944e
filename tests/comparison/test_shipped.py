"""The comparisons that come with mmgraft."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from mmgraft.comparison.spec import FOLDER, arm_recipe, load_comparison, shipped_comparisons
from mmgraft.evaluation.items.files import PACKAGED
from mmgraft.recipes.source import recipe_dir, shipped_recipes

NAMES = shipped_comparisons()
PREPARED = {"align.jsonl", "tune.jsonl", "train.jsonl", "test.jsonl"}


def test_all_are_there_and_no_recipe_has_their_names() -> None:
    assert set(NAMES) >= {
        *("easy-vqa", "iaa-structures", "iaa-layers", "iaa-stages", "wings-learners", "wings-lr"),
        *("harder", "easy-vqa-variants"),
    }
    assert not set(NAMES) & set(shipped_recipes())


@pytest.mark.parametrize("name", NAMES)
def test_arms_are_right_recipes_with_one_budget(name: str) -> None:
    comparison = load_comparison(name)
    assert comparison.name == name
    arms = comparison.all_arms()
    assert len(arms) >= 2
    budgets = set()
    for arm_name, arm in arms.items():
        recipe = arm_recipe(arm_name, arm)
        assert {stage.name for stage in recipe.stages} == set(comparison.data)
        assert recipe.feature_cache is True
        budgets.add(tuple((s.name, s.max_steps, s.batch_size) for s in recipe.stages))
    assert len(budgets) == 1
    assert all(steps for _, steps, _ in next(iter(budgets)))


@pytest.mark.parametrize("name", NAMES)
def test_files_are_those_that_data_prepare_writes(name: str) -> None:
    comparison = load_comparison(name)
    paths = {entry.path for entries in comparison.data.values() for entry in entries}
    paths |= {path for one in comparison.evaluation for path in (one.path, one.train) if path}
    assert paths <= PREPARED | set(PACKAGED)
    for one in comparison.evaluation:
        packaged = PACKAGED.get(one.path or "")
        assert packaged is None or packaged.metric == one.metric or one.chat


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_its_source(name: str) -> None:
    text = (recipe_dir() / FOLDER / f"{name}.yaml").read_text()
    lines = text.splitlines()
    valued: set[int] = set()

    def walk(node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(value, yaml.ScalarNode) or value.flow_style:
                    if not (isinstance(value, yaml.ScalarNode) and value.value == ""):
                        valued.add(key.start_mark.line)
                else:
                    walk(value)
        else:
            assert isinstance(node, yaml.SequenceNode)
            for item in node.value:
                walk(item)

    walk(yaml.compose(text))
    assert len(valued) > 10
    for number in valued:
        assert re.search(r" # (paper|official script|ours)\b", lines[number]), lines[number]


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_at_the_top_are_about_this_comparison(name: str) -> None:
    text = (recipe_dir() / FOLDER / f"{name}.yaml").read_text().split("\n#\n")[0]
    prepare, compare = (shlex.split(line.removeprefix("# ")) for line in text.splitlines())
    root = str(load_comparison(name).root)
    if prepare[0] == "python":
        script = Path(__file__).parents[2] / prepare[1]
        assert script.is_file()
        assert prepare[2:] == ["--out", root] == ["--out", script.parent.name]
    else:
        assert prepare == ["mmgraft", "data", "prepare", root]
    assert compare == ["mmgraft", "compare", name, "--out", f"compare-{name}"]


def test_easy_vqa_has_the_four_methods_of_the_papers() -> None:
    arms = load_comparison("easy-vqa").all_arms()
    found = {name: arm_recipe(name, arm) for name, arm in arms.items()}
    assert {name: (one.method, one.base) for name, one in found.items()} == {
        "llava-full": ("llava", "full"),
        "llava": ("llava", "frozen"),
        "iaa": ("iaa", "frozen"),
        "wings": ("wings", "frozen"),
    }
    assert "base" in found["llava-full"].stages[1].train


def test_grids_vary_what_their_papers_vary() -> None:
    def values(name: str, key: str) -> list:
        return load_comparison(name).grid[key]

    assert values("iaa-structures", "graft.config.structure") == ["a", "b", "c"]
    layers = values("iaa-layers", "graft.config.layers")
    assert [len(one) for one in layers] == [1, 2, 4, 8]
    stages = load_comparison("iaa-stages").all_arms()
    trained = {n: arm_recipe(n, arm).stages[0].train for n, arm in stages.items()}
    assert trained["two-stage"] == ["projector"]
    assert "layers" in trained["one-stage"]
    learners = load_comparison("wings-learners").all_arms()
    assert {n: arm_recipe(n, arm).graft.config["learners"] for n, arm in learners.items()} == {
        "visual": ["visual"],
        "textual": ["textual"],
        "both": ["visual", "textual"],
    }
    assert arm_recipe("both", learners["both"]).graft.config["router"] is True
