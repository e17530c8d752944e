"""Comparisons as YAML: arms and grids, what is set where, files by root, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mmgraft.comparison.spec import (
    Comparison,
    arm_recipe,
    dump_comparison,
    find_comparison,
    is_comparison,
    load_comparison,
    overrides_of,
    with_files,
    with_settings,
)
from mmgraft.errors import UsageError
from mmgraft.recipes.source import recipe_dir

SMALL = {"name": "x", "base": "b", "vision": "v", "recipe": "demo-iaa"}


def small(**more) -> Comparison:
    return Comparison.parse({**SMALL, **more}, "x.yaml")


def refusal(**more) -> str:
    with pytest.raises(UsageError) as caught:
        small(**more)
    return str(caught.value)


def test_what_is_set_later_and_nearer_wins() -> None:
    spec = small(
        seed=3,
        set={"log_every": 5, "save_every": 50},
        arms={"one": {}, "two": {"recipe": "demo-llava", "set": {"log_every": 7, "seed": 9}}},
    )
    arms = spec.all_arms()
    assert arms["one"].recipe == "demo-iaa"
    assert arms["one"].set == {"seed": 3, "log_every": 5, "save_every": 50}
    assert arms["two"].recipe == "demo-llava"
    assert arms["two"].set == {"seed": 9, "log_every": 7, "save_every": 50}
    recipe = arm_recipe("two", arms["two"])
    assert (recipe.method, recipe.seed, recipe.log_every, recipe.save_every) == ("llava", 9, 7, 50)


def test_a_later_key_wins_also_where_an_earlier_one_names_all_stages() -> None:
    spec = small(
        set={"stages.tune.lr": 0.1, "stages.*.lr": 0.2},
        arms={"one": {}, "two": {"set": {"stages.tune.lr": 0.3}}},
    )

    def rates(name: str, of: Comparison) -> list:
        return [stage.lr for stage in arm_recipe(name, of.all_arms()[name]).stages]

    assert rates("one", spec) == [0.2, 0.2]
    assert rates("two", spec) == [0.2, 0.3]
    told = with_settings(spec, ["two:stages.*.lr=0.4", "one:stages.tune.lr=0.5"])
    assert (rates("one", told), rates("two", told)) == ([0.2, 0.5], [0.4, 0.4])


def test_a_grid_is_every_combination_in_order_with_names_to_read() -> None:
    spec = small(grid={"graft.config.structure": ["a", "b"], "stages.tune.lr": [1e-3, 5e-5]})
    assert list(spec.all_arms()) == [
        "structure-a_lr-0.001",
        "structure-a_lr-5e-05",
        "structure-b_lr-0.001",
        "structure-b_lr-5e-05",
    ]
    assert spec.all_arms()["structure-b_lr-5e-05"].set == {
        "seed": 0,
        "graft.config.structure": "b",
        "stages.tune.lr": 5e-5,
    }
    recipe = arm_recipe("x", spec.all_arms()["structure-b_lr-5e-05"])
    assert recipe.graft.config["structure"] == "b"
    assert recipe.stages[1].lr == 5e-5


def test_arms_of_a_grid_never_share_a_name() -> None:
    same_end = small(grid={"stages.align.lr": [1.0], "stages.tune.lr": [1.0, 2.0]})
    assert list(same_end.all_arms()) == ["align.lr-1.0_tune.lr-1.0", "align.lr-1.0_tune.lr-2.0"]
    same_word = small(grid={"graft.config.layers": [[1, 2], "1,2"]})
    assert list(same_word.all_arms()) == ["layers-1-2", "layers-1-2.2"]
    odd = small(grid={"feature_cache": [True, None, "a/b c"]})
    assert list(odd.all_arms()) == [
        "feature_cache-true",
        "feature_cache-none",
        "feature_cache-a-b-c",
    ]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "nothing to compare"),
        ({"arms": {}}, "nothing to compare"),
        ({"arms": {"a": {}}, "grid": {"seed": [1]}}, "write one of them"),
        ({"grid": {"seed": []}}, "'seed' has no values"),
        ({"grid": {"seed": [1, 2, 1]}}, "'seed' has a value twice"),
        ({"arms": {"a": {}}, "recipe": None}, "arm 'a' names no recipe"),
        ({"grid": {"seed": [1]}, "recipe": None}, "a grid needs a recipe"),
        ({"arms": {"a/b": {}}}, "arm 'a/b'"),
        ({"arms": {"a": {"sett": {}}}}, "did you mean 'set'"),
        ({"arms": {"a": {}}, "iit": {}}, "no set of evaluation has metric: choice"),
        ({"arms": {"a": {}}, "stage": 1}, "unknown key 'stage'"),
        ({"arms": {"a": {}}, "data": {"tune": [{"pth": "x"}]}}, "did you mean 'path'"),
        (
            {
                "arms": {"a": {}},
                "evaluation": [{"name": "s", "metric": "exact", "path": "p"}] * 2,
            },
            "two evaluation sets are called 's'",
        ),
    ],
)
def test_refusals(wrong, says) -> None:
    assert says in refusal(**wrong)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stages.tun.lr": 1}, "arm 'a': stages.tun.lr=1: no entry 'tun'; did you mean 'tune'"),
        ({"stages.tune.lrr": 1}, "did you mean 'lr'"),
        ({"graft.config.layerz": "all"}, "did you mean 'layers'"),
        ({"base": "full"}, "arm 'a'"),
    ],
)
def test_an_arm_that_cannot_be_is_refused_with_its_name(settings, says) -> None:
    with pytest.raises(UsageError) as caught:
        arm_recipe("a", small(arms={"a": {"set": settings}}).all_arms()["a"])
    assert says in str(caught.value)
    assert "arm 'a': " in str(caught.value)


def test_data_may_be_written_short() -> None:
    def paths(data) -> dict[str, list[str | None]]:
        found = small(arms={"a": {}}, data=data).data
        return {stage: [one.path for one in entries] for stage, entries in found.items()}

    assert paths("x.jsonl") == {"*": ["x.jsonl"]}
    assert paths({"path": "x.jsonl", "weight": 2}) == {"*": ["x.jsonl"]}
    assert paths(["x.jsonl", {"path": "y"}]) == {"*": ["x.jsonl", "y"]}
    assert paths({"tune": "x", "*": ["y", "z"]}) == {"tune": ["x"], "*": ["y", "z"]}


def test_files_of_the_command_line_stand_over_those_of_the_file() -> None:
    spec = small(arms={"a": {}}, data={"align": "a", "tune": "t"})
    one = with_files(spec, ["tune=new", "tune=more"], "pics")
    assert [entry.path for entry in one.data["tune"]] == ["new", "more"]
    assert one.data["tune"][0].images == "pics"
    assert one.data["align"][0].path == "a"
    assert one.images == "pics"
    everything = with_files(spec, ["all.jsonl"], None)
    assert [*everything.data] == ["*"]
    assert with_files(spec, [], None).data == spec.data


def test_settings_of_the_command_line_come_last() -> None:
    spec = small(grid={"seed": [1, 2]}, set={"log_every": 5})
    changed = with_settings(spec, ["log_every=9", "seed-2:stages.tune.lr=1e-4"]).all_arms()
    assert [arm.set["seed"] for arm in changed.values()] == [1, 2]
    assert [arm.set["log_every"] for arm in changed.values()] == [9, 9]
    assert arm_recipe("x", changed["seed-2"]).stages[1].lr == 1e-4
    assert arm_recipe("x", changed["seed-1"]).stages[1].lr == 1e-3
    # A later key is applied later: what it names must win over what was set before it.
    deeper = with_settings(small(arms={"a": {"set": {"stages.tune.lr": 1.0}}}), ["stages.*.lr=2.0"])
    assert arm_recipe("a", deeper.all_arms()["a"]).stages[1].lr == 2.0
    with pytest.raises(UsageError, match="did you mean 'seed-2'"):
        with_settings(spec, ["seed-22:seed=1"])
    with pytest.raises(UsageError, match="write key=value"):
        with_settings(spec, ["seed"])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab: ,'#-", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner),
    max_leaves=5,
)


@given(values)
def test_a_setting_survives_its_way_through_text(value) -> None:
    (text,) = overrides_of({"a.b": value})
    key, _, written = text.partition("=")
    assert key == "a.b"
    assert yaml.safe_load(written) == value


def test_paths_are_taken_from_root_where_they_are_there(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "mmlu").mkdir()  # a folder is not the set of that name
    for name in ("root/rows.jsonl", "root/test.jsonl", "elsewhere.jsonl"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    spec = small(
        arms={"a": {}},
        root="root",
        images="root",
        data=["rows.jsonl", "elsewhere.jsonl", "missing.jsonl", "r*.jsonl", "hub:me/set"],
        evaluation=[
            {"name": "seen", "metric": "exact", "path": "test.jsonl", "train": "rows.jsonl"},
            {"name": "mmlu", "metric": "choice", "modality": "text", "path": "mmlu"},
        ],
        laws={"path": "test.jsonl"},
    ).placed()
    root = tmp_path / "root"
    assert [one.path for one in spec.data["*"]] == [
        str(root / "rows.jsonl"),
        str(tmp_path / "elsewhere.jsonl"),
        "missing.jsonl",
        str(root / "r*.jsonl"),
        "hub:me/set",
    ]
    assert spec.data["*"][0].images == str(root)
    seen, mmlu = spec.evaluation
    assert (seen.path, seen.train, seen.images) == (
        str(root / "test.jsonl"),
        str(root / "rows.jsonl"),
        str(root),
    )
    assert (mmlu.path, mmlu.images) == ("mmlu", None)
    assert spec.laws is not None
    assert spec.laws.path == str(root / "test.jsonl")


def test_a_comparison_is_written_and_read_back(tmp_path: Path) -> None:
    spec = small(grid={"seed": [1, 2]}, data={"tune": "x"}, laws={"path": "p"})
    path = tmp_path / "c.yaml"
    path.write_text(dump_comparison(spec))
    assert load_comparison(path) == spec
    assert is_comparison(path)


def test_a_recipe_is_no_comparison() -> None:
    path = recipe_dir() / "iaa.yaml"
    assert not is_comparison(path)
    with pytest.raises(UsageError, match="is a recipe"):
        load_comparison(path)


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'easy-vqa'"):
        find_comparison("easy-vqaa")
    with pytest.raises(UsageError, match=r"no comparison file .*nowhere\.yaml"):
        find_comparison("nowhere.yaml")


def test_comparisons_load_without_torch() -> None:
    code = (
        "import sys; from mmgraft.comparison.spec import load_comparison; "
        "load_comparison('easy-vqa'); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_several_seeds_give_each_arm_one_of_each_by_seed() -> None:
    own = {"one": {}, "two": {"recipe": "demo-llava"}}
    spec = small(seed=[3, 0], set={"log_every": 5}, arms=own)
    arms = spec.all_arms()
    assert [*arms] == ["one.seed3", "two.seed3", "one.seed0", "two.seed0"]
    assert [arm.repeats for arm in arms.values()] == ["one", "two"] * 2
    assert [arm_recipe(name, arm).seed for name, arm in arms.items()] == [3, 3, 0, 0]
    assert arms["two.seed0"].recipe == "demo-llava"
    assert {arm.set["log_every"] for arm in arms.values()} == {5}
    grid = small(seed=[1], grid={"log_every": [2, 3]}).all_arms()
    assert [*grid] == ["log_every-2.seed1", "log_every-3.seed1"]


def test_written_down_several_seeds_stay_the_same_arms() -> None:
    spec = small(seed=[3, 0], arms={"one": {}})
    named = spec.model_copy(update={"arms": spec.all_arms()})
    again = Comparison.parse(yaml.safe_load(dump_comparison(named)), "again")
    assert again.all_arms() == spec.all_arms()


def test_a_setting_for_an_arm_is_for_all_its_seeds() -> None:
    spec = small(seed=[3, 0], arms={"one": {}, "two": {}})
    told = with_settings(spec, ["one:log_every=9", "two.seed0:log_every=7"]).all_arms()
    found = [arm.set.get("log_every") for arm in told.values()]
    assert found == [9, None, 9, 7]
    assert [arm.repeats for arm in told.values()] == ["one", "two"] * 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": [1, 2, 1], "arms": {"a": {}}}, "one twice"),
        ({"seed": [], "arms": {"a": {}}}, "no seed"),
        ({"seed": [1, 2], "arms": {"a": {"set": {"seed": 4}}}}, "arm 'a' sets its own seed"),
    ],
)
def test_seeds_that_say_nothing_clear_are_refused(changes, says: str) -> None:
    assert says in refusal(**changes)
