"""Arms are resolved and checked before anything is trained, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmgraft.comparison import plan as planning
from mmgraft.comparison.files import PhaseRecord, arm_folder, write_phase
from mmgraft.comparison.plan import make_graft, make_plan
from mmgraft.comparison.spec import Comparison, DialoguesSpec, load_comparison, with_settings
from mmgraft.errors import UsageError
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.model.files.graft_file import TemplateChoice
from mmgraft.recipes.source import load_recipe
from mmgraft.vision.projectors.configs import MlpConfig


def test_arms_share_base_tower_data_and_seed(write, parts: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    spec = load_comparison(write(seed=5, set={"stages.tune.batch_size": 2}))
    out = tmp_path / "out"
    plan = make_plan(spec, out, device="cpu")
    assert [arm.name for arm in plan.arms] == ["llava", "iaa"] == list(plan.chosen)
    assert plan.base == str(parts / "base")
    for arm in plan.arms:
        (entry,) = arm.recipe.stages[0].data or []
        assert entry.path == str(parts / "rows.jsonl")
        assert entry.images == str(parts / "images")
        assert arm.recipe.seed == 5
        (stage,) = arm.stages
        assert (stage.rows, stage.steps, stage.rows_a_step) == (9, 2, 2)
        assert not arm.own_budget
        assert arm.run == out / "arms" / arm.name
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "tiny.yaml"])


def test_the_odd_one_out_has_a_budget_of_its_own(write, parts: Path, tmp_path: Path) -> None:
    recipe = str(parts / "llava.yaml")
    spec = load_comparison(
        write(
            arms={
                "more": {"recipe": recipe, "set": {"stages.tune.max_steps": 3}},
                "usual": {"recipe": recipe},
                "other": {"recipe": recipe, "set": {"stages.tune.lr": 1.0}},
                "wider": {"recipe": recipe, "set": {"stages.tune.accumulate": 2}},
            }
        )
    )
    arms = make_plan(spec, tmp_path / "out").arms
    assert {arm.name: arm.own_budget for arm in arms} == {
        "more": True,
        "usual": False,
        "other": False,
        "wider": True,
    }


def test_epochs_become_steps_and_max_steps_ends_them(write, parts: Path, tmp_path: Path) -> None:
    spec = load_comparison(write(set={"stages.tune.max_steps": None, "stages.tune.epochs": 2}))
    (stage,) = make_plan(spec, tmp_path / "out").arms[0].stages
    assert stage.steps == 6  # 9 rows are 3 batches of 4, twice
    (stage,) = make_plan(spec, tmp_path / "out", max_steps=1).arms[0].stages
    assert stage.steps == 1


def test_steps_are_counted_as_a_training_takes_them(write, tmp_path: Path) -> None:
    """9 rows are 5 batches of 2, which are 3 steps of 2; one and a half epochs are 5."""
    stage = {"max_steps": None, "epochs": 1.5, "batch_size": 2, "accumulate": 2}
    spec = load_comparison(write(set={f"stages.tune.{key}": one for key, one in stage.items()}))
    (found,) = make_plan(spec, tmp_path / "out").arms[0].stages
    assert (found.rows, found.steps, found.rows_a_step) == (9, 5, 4)
    assert (found.sequences_a_step, found.epochs, found.packed) == (4, 1.5, None)


def test_packed_rows_are_not_counted_as_if_each_stood_alone(
    write, parts: Path, tmp_path: Path
) -> None:
    """Arms that pack alike have one budget, and it is that of no arm that packs otherwise."""
    alone = {"stages.tune.max_steps": None, "stages.tune.epochs": 1}
    packed = {**alone, "stages.tune.packing": True, "stages.tune.max_length": 64}
    arms = {
        "one": packed,
        "other": {**packed, "stages.tune.lr": 1.0},
        "longer": {**packed, "stages.tune.max_length": 128},
        "twice": {**packed, "stages.tune.epochs": 2},
        "alone": alone,
    }
    recipe = str(parts / "llava.yaml")
    spec = load_comparison(
        write(arms={name: {"recipe": recipe, "set": more} for name, more in arms.items()})
    )
    planned = {arm.name: arm for arm in make_plan(spec, tmp_path / "out").arms}
    (stage,) = planned["one"].stages
    assert (stage.rows, stage.steps, stage.rows_a_step) == (9, None, None)
    assert stage.sequences_a_step == 4
    assert planned["alone"].stages[0].steps == 3
    own = {name: arm.own_budget for name, arm in planned.items()}
    assert own == {"one": False, "other": False, "longer": True, "twice": True, "alone": True}
    spec = load_comparison(write(arms={"one": {"recipe": recipe, "set": packed}}))
    (stage,) = make_plan(spec, tmp_path / "out", max_steps=1).arms[0].stages
    assert (stage.steps, stage.rows_a_step) == (1, None)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, {"layer": -4, "template": None}),
        ({"vision": {"id": "some/tower", "feature_layer": 0}}, {"layer": 0, "template": None}),
        ({"template": "plain"}, {"layer": -4, "template": TemplateChoice(kind="plain")}),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_graft_is_made_as_its_recipe_says(
    write, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes, wanted, dry_run
) -> None:
    """Every setting of it off its default, and what the comparison settles for all."""
    made: list[tuple[Any, Any]] = []
    monkeypatch.setattr(planning, "create_graft", lambda *args, **more: made.append((args, more)))
    recipe = {
        "name": "own", "method": "iaa", "workflow": "see", "seed": 7,
        "graft": {
            "config": {"layers": [2], "structure": "b"},
            "feature_layer": -4, "projector": {"kind": "mlp", "norm": True, "hidden": 7},
        },
        "stages": [{"name": "tune", "train": ["projector"], "lr": 1.0, "batch_size": 1}],
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    arms = {"own": {"recipe": str(tmp_path / "own.yaml")}}
    spec = load_comparison(write(arms=arms, base="x/base", **changes))
    plan: Any = SimpleNamespace(base="x/base", vision=spec.vision, comparison=spec)
    make_graft(plan, load_recipe(tmp_path / "own.yaml"), tmp_path / "run", dry_run=dry_run)
    (args, more), *others = made
    base, vision, config, run = args
    assert (base, run, others) == ("x/base", tmp_path / "run", [])
    assert (vision.id, vision.feature_layer) == (spec.vision.id, wanted["layer"])
    assert config == IAAConfig(layers=[2], structure="b")
    assert more == {
        "workflow": "see", "projector": MlpConfig(norm=True, hidden=7),
        "template": wanted["template"], "seed": 7, "dry_run": dry_run,
    }  # fmt: skip


def test_limit_samples_fewer_items_never_more(write, tmp_path: Path) -> None:
    sets = [
        {"name": "few", "metric": "exact", "path": "rows.jsonl", "limit": 2},
        {"name": "all", "metric": "exact", "path": "rows.jsonl"},
    ]
    spec = load_comparison(write(evaluation=sets, laws={"path": "rows.jsonl"}))
    spec = spec.model_copy(update={"iit": DialoguesSpec()})
    for limit, laws, dialogues in ((10, 10, 10), (80, 64, 80), (200, 64, 100)):
        found = make_plan(spec, tmp_path / "out", limit=limit).comparison
        assert [one.limit for one in found.evaluation] == [2, limit]
        assert found.laws is not None
        assert found.iit is not None
        assert (found.laws.limit, found.iit.count) == (laws, dialogues)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluation": [{"name": "s", "metric": "exact", "path": "gone.jsonl"}]}, "gone.jsonl"),
        (
            {"evaluation": [
                {"name": "s", "metric": "perplexity", "path": "read.csv", "columns": {"text": "x"}},
            ]},
            "read.csv",
        ),
        (
            {"evaluation": [
                {"name": "s", "metric": "exact", "path": "rows.jsonl", "workflow": "boxes"},
            ]},
            "needs workflow 'boxes', and arm 'llava' has 'mm'",
        ),
        ({"laws": {"path": "gone.jsonl"}}, "gone.jsonl"),
        ({"laws": {"path": "x.jsonl"}, "root": "unprepared"}, "mmgraft data prepare"),
        ({"iit": {"path": "nowhere"}}, "no dialogues in nowhere"),
    ],
)  # fmt: skip
def test_nothing_is_trained_for_a_set_that_cannot_be_evaluated(
    write, tmp_path, changes, says
) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(load_comparison(write(**changes)), tmp_path / "out")
    assert says in str(caught.value)


def test_arms_that_are_alike_are_refused(write, tmp_path: Path) -> None:
    recipe = load_comparison(write()).arms["iaa"].recipe
    spec = load_comparison(write(arms=None, recipe=recipe, grid={"stages.tune.lr": [0.1, 0.2]}))
    assert len(make_plan(spec, tmp_path / "out").arms) == 2
    with pytest.raises(UsageError, match=r"'lr-0.1' and 'lr-0.2' would be trained exactly alike"):
        make_plan(with_settings(spec, ["stages.tune.lr=0.3"]), tmp_path / "out")


def test_what_is_written_down_plans_the_same_again(write, tmp_path: Path) -> None:
    spec = load_comparison(
        write(
            arms=None,
            recipe=load_comparison(write()).arms["iaa"].recipe,
            grid={"graft.config.structure": ["a", "c"]},
        )
    )
    plan = make_plan(spec, tmp_path / "out")
    again = make_plan(
        Comparison.parse(json.loads(plan.comparison.model_dump_json()), "again"), tmp_path / "out"
    )
    assert [arm.name for arm in plan.arms] == ["structure-a", "structure-c"]
    assert [arm.recipe for arm in again.arms] == [arm.recipe for arm in plan.arms]
    assert again.base == plan.base
    assert again.vision == plan.vision


def test_features_are_shared_where_a_recipe_keeps_them(write, tmp_path: Path) -> None:
    spec = load_comparison(write(set={"feature_cache": True}))
    arms = make_plan(spec, tmp_path / "out").arms
    assert {arm.recipe.feature_cache for arm in arms} == {str(tmp_path / "out/features")}
    own = load_comparison(write(set={"feature_cache": False}))
    assert make_plan(own, tmp_path / "out").arms[0].recipe.feature_cache is False


def test_only_names_arms_and_finds_the_nearest(write, tmp_path: Path) -> None:
    spec = load_comparison(write())
    plan = make_plan(spec, tmp_path / "out", only=["iaa"])
    assert plan.chosen == ("iaa",)
    assert len(plan.arms) == 2
    with pytest.raises(UsageError, match="did you mean 'iaa'"):
        make_plan(spec, tmp_path / "out", only=["iia"])


def test_phases_that_are_done_are_told(write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_phase(arm_folder(out, "iaa"), PhaseRecord(phase="graft", done=True))
    write_phase(arm_folder(out, "iaa"), PhaseRecord(phase="train"))
    plan = make_plan(load_comparison(write()), out)
    assert {arm.name: arm.done for arm in plan.arms} == {"llava": (), "iaa": ("graft",)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {}}, "no data for data[0].path"),
        ({"data": {"align": "rows.jsonl"}}, "no data for stage 'tune'"),
        ({"data": {"*": "rows.jsonl", "tun": "x"}}, "which no arm has; did you mean 'tune'"),
        ({"data": {"tune": "gone.jsonl"}}, "gone.jsonl; give a LLaVA json"),
        ({"set": {"stages.tune.lr": -1}}, "arm 'llava': "),
        ({"set": {"graft.config.layers": [9]}}, "unknown key 'graft.config.layers'"),
        ({"set": {"method": "nope"}}, "arm 'llava': "),
        ({"base": "nowhere"}, "unknown model 'nowhere'"),
    ],
)
def test_refusals_name_the_arm(write, tmp_path: Path, changes, says) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(load_comparison(write(**changes)), tmp_path / "out")
    assert says in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_arm_that_cannot_be_grafted_is_refused_before_the_first_is_trained(
    write, parts: Path, tmp_path: Path
) -> None:
    arms = {
        "good": {"recipe": str(parts / "iaa.yaml")},
        "bad": {"recipe": str(parts / "iaa.yaml"), "set": {"graft.config.layers": [99]}},
    }
    spec = load_comparison(write(arms=arms))
    with pytest.raises(UsageError, match=r"arm 'bad': .*99"):
        make_plan(spec, tmp_path / "out")
    make_plan(spec, tmp_path / "out", only=["good"])


def test_the_runs_recipe_has_the_sets(write, tmp_path: Path) -> None:
    sets = [{"name": "seen", "metric": "exact", "path": "rows.jsonl"}]
    (first, _) = make_plan(load_comparison(write(evaluation=sets)), tmp_path / "out").arms
    assert [one.name for one in first.recipe.evaluation] == ["seen"]
    assert yaml.safe_dump(first.recipe.model_dump(mode="json"))


def test_a_bad_row_is_refused_or_left_out_as_each_arm_says(write, parts, tmp_path: Path) -> None:
    """An arm that skips is planned with the rows that are left; one that does not is refused."""
    lines = (parts / "rows.jsonl").read_text().splitlines()
    bad = json.loads(lines[0])
    bad["messages"][0]["content"] = [{"type": "image", "image": "gone.png"}]
    rows = tmp_path / "bad.jsonl"
    rows.write_text("\n".join([json.dumps(bad), *lines[1:]]) + "\n")
    data = {"tune": {"path": str(rows), "images": str(parts / "images")}}
    epoch = {"stages.tune.max_steps": None, "stages.tune.epochs": 1, "stages.tune.batch_size": 1}
    spec = load_comparison(write(data=data, set={**epoch, "on_bad_row": "skip"}))
    for arm in make_plan(spec, tmp_path / "out").arms:
        assert [(stage.rows, stage.steps) for stage in arm.stages] == [(8, 8)]  # one fewer of 9
    spec = with_settings(spec, ["on_bad_row=error"])
    with pytest.raises(UsageError, match=r"arm 'llava': .*bad\.jsonl, line 1.*gone\.png"):
        make_plan(spec, tmp_path / "out")


def test_an_arm_with_several_seeds_is_chosen_whole_or_by_one(write, tmp_path: Path) -> None:
    spec = load_comparison(write(seed=[0, 5]))
    for only, chosen in (
        (["iaa"], ("iaa.seed0", "iaa.seed5")),
        (["iaa.seed5", "llava.seed0"], ("iaa.seed5", "llava.seed0")),
    ):
        assert make_plan(spec, tmp_path / "out", only=only, device="cpu").chosen == chosen
    with pytest.raises(UsageError, match="no arm 'wings'"):
        make_plan(spec, tmp_path / "out", only=["wings"])


def test_a_seed_is_of_the_grafts_first_values_too(write, tmp_path: Path) -> None:
    spec = load_comparison(write(seed=[0, 5]))
    plan = make_plan(spec, tmp_path / "out", device="cpu")
    files = {}
    for arm in plan.arms:
        make_graft(plan, arm.recipe, tmp_path / arm.name)
        tensors = load_file(tmp_path / arm.name / "graft.safetensors")
        files[arm.name] = {name: one for name, one in tensors.items() if "projector" in name}
    weight = next(name for name, one in files["llava.seed0"].items() if one.dim() == 2)
    first = {name: tensors[weight] for name, tensors in files.items()}
    assert torch.equal(first["llava.seed0"], first["iaa.seed0"]), "one start for all methods"
    assert torch.equal(first["llava.seed5"], first["iaa.seed5"])
    assert not torch.equal(first["llava.seed0"], first["llava.seed5"])
