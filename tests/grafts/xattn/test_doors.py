"""Cross-attention through the commands: one position an image, gates in training, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from grafting import graft_on
from mmgraft import GraftedModel, XattnConfig
from mmgraft.cli.app import run as mmgraft
from mmgraft.errors import UsageError
from mmgraft.grafts.xattn.graft import SHUT
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import load_processor
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.training.memory.estimate import subject_of_run
from mmgraft.training.run import plan_training, train
from mmgraft.training.session import Session
from mmgraft.training.stages import rate_groups
from mmgraft.training.views import Selection, views
from mmgraft.vision.towers.registry import describe_tower
from tiny_runs import losses, make_parts, make_run, write_recipe

BOTH = ["projector", "graft"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


def stage(**values: Any) -> Stage:
    return Stage.model_validate(
        {"name": "tune", "train": BOTH, "lr": 1e-4, "workflow": "mm"} | values
    )


def trained(run: Path, parts: Path, *stages: dict[str, Any], **recipe: Any) -> list[str]:
    """Trains a run, and returns what was said."""
    write_recipe(run, parts, "xattn", list(stages), **recipe)
    said: list[str] = []
    train(plan_training(run, device="cpu"), said.append)
    return said


def readings(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["graft"] for line in lines if "graft" in line]


# -- one position ---------------------------------------------------------------------------------


def test_everything_that_counts_positions_counts_one(parts: Path, tmp_path: Path) -> None:
    """The same projector makes four vectors, and of another method four positions."""
    run, other = (make_run(parts, tmp_path / name, name) for name in ("xattn", "llava"))
    tower = describe_tower(GraftFile.read(run).vision)
    for folder, count in ((run, 1), (other, 4)):
        record = GraftFile.read(folder)
        assert record.positions(tower).fixed == count
        assert subject_of_run(folder).positions.fixed == count
        processor = load_processor(record, parts / "base", tower)
        image = {"type": "image", "image": str(parts / "images" / "0.png")}
        encoded = processor.encode([{"role": "user", "content": [image, image]}])
        assert encoded.lengths == (count, count)
        assert sum(encoded.kinds) == 2 * count
        assert GraftedModel.from_pretrained(folder).processor().image_positions.fixed == count
        names = {"base": str(parts / "base"), "vision": str(parts / "tower")}
        recipe = str(
            write_recipe(folder, parts, record.method, [stage(train=["projector"]).model_dump()])
        )
        for chosen in (Selection(folder), Selection(parts / "rows.jsonl", **names, recipe=recipe)):
            (view,) = views(chosen)
            assert view.processor is not None
            assert view.processor.image_positions.fixed == count


def test_a_feature_cache_packing_and_evaluation_go_with_it(parts: Path, tmp_path: Path) -> None:
    """The same losses as without a cache of features, and with rows packed into sequences."""
    each = {}
    held = [{"path": str(parts / "rows.jsonl"), "images": str(parts / "images")}]
    for name, more in (("plain", {}), ("cached", {"feature_cache": True})):
        run = make_run(parts, tmp_path / name, "xattn")
        tune = {"name": "tune", "train": BOTH, "lr": 1e-2, "max_steps": 3, "batch_size": 3}
        trained(run, parts, tune, eval_every=3, eval_data=held, **more)
        each[name] = [loss for *_, loss in losses(run)]
    assert each["plain"] == pytest.approx(each["cached"], abs=1e-6)
    run = make_run(parts, tmp_path / "packed", "xattn")
    tune = {"name": "tune", "train": BOTH, "lr": 1e-2, "max_steps": 2, "packing": True,
            "max_length": 64}  # fmt: skip
    trained(run, parts, tune)
    assert losses(run)[1][2] < losses(run)[0][2]


# -- gates ----------------------------------------------------------------------------------------


def test_gates_have_a_rate_of_their_own_and_never_decay() -> None:
    model = graft_on("llama", XattnConfig(layers=[1], gate_size="channel"))
    model.set_trainable(BOTH)
    found = {group.name: group for group in rate_groups(model, stage())}
    assert {name: group.lr for name, group in found.items()} == {
        "projector": 1e-4, "graft": 1e-4, "gates": 1e-2,
    }  # fmt: skip
    assert all(name.endswith(".gate") for name in found["gates"].parameters)
    named = stage(lr={"default": 1e-4, "gates": 3e-3, "marker": 2e-3})
    rates = {group.name: group.lr for group in rate_groups(model, named)}
    assert (rates["gates"], rates["marker"]) == (3e-3, 2e-3)


def test_neither_gates_nor_the_marker_decay(parts: Path, tmp_path: Path) -> None:
    """Decay would pull a gate shut."""
    run = make_run(parts, tmp_path / "run", "xattn", gate_init=0.5)
    tune = {"name": "tune", "train": ["gates", "marker"], "lr": {"gates": 1e-9, "marker": 1e-9},
            "max_steps": 2, "weight_decay": 0.9}  # fmt: skip
    write_recipe(run, parts, "xattn", [tune])
    seen: list[tuple[int, float]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for group in kwargs["optimizer"].param_groups:
                seen.extend((one.dim(), group["weight_decay"]) for one in group["params"])

    plan = plan_training(run, device="cpu")
    Session(plan, lambda text: None).run_stage(0, [Watch()])
    assert {dim for dim, _ in seen} == {1}
    assert {decay for _, decay in seen} == {0.0}


def test_gates_are_logged_and_open(parts: Path, tmp_path: Path) -> None:
    """Trap: gates that stay shut because their rate is small."""
    run = make_run(parts, tmp_path / "run", "xattn", feedforward="4h")
    tune = {"name": "tune", "train": BOTH, "lr": 1e-4, "max_steps": 20, "batch_size": 4,
            "schedule": "constant"}  # fmt: skip
    said = trained(run, parts, tune)
    logged = readings(run)
    assert len(logged) == 20
    assert set(logged[0]) == {
        f"gate.{i}.{half}" for i in (0, 2) for half in ("attention", "feedforward")
    }
    graft: Any = GraftedModel.from_pretrained(run).workflow().graft
    last = graft.blocks["2"].attention.opening().item()
    assert logged[-1]["gate.2.attention"] == pytest.approx(last, abs=1e-6)
    assert max(map(abs, logged[-1].values())) > SHUT
    assert not any("stayed shut" in one for one in said)


def test_gates_that_stay_shut_are_told_behind_the_last_stage(parts: Path, tmp_path: Path) -> None:
    run = make_run(parts, tmp_path / "run", "xattn")
    rates = {"default": 1e-4, "gates": 1e-4}
    stages = [{"name": name, "train": BOTH, "lr": rates, "max_steps": 2} for name in ("one", "two")]
    said = trained(run, parts, *stages)
    told = [one for one in said if "the gates stayed shut" in one]
    assert len(told) == 1
    assert "lr: {gates: 1.0e-2}" in told[0]
    assert said.index(told[0]) > said.index("stage 'one' is done and saved")


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"train": ["projector"], "graft_active": False}, "without its blocks nothing reads"),
        ({"train": ["projector", "base"]}, "keeps its base frozen"),
        ({"train": ["learners"]}, "trains 'learners', which xattn does not have"),
        ({"lr": {"default": 1.0, "gate": 1.0}}, "did you mean 'gates'"),
    ],
)
def test_stages_that_cannot_work_are_refused(stage: dict[str, Any], says: str) -> None:
    stages = [{"name": "tune", "train": BOTH, "lr": 1e-3, **stage}]
    with pytest.raises(UsageError, match=says):
        Recipe.parse({"name": "one", "method": "xattn", "stages": stages}, "recipe")


# -- commands -------------------------------------------------------------------------------------


def test_what_it_cannot_do_is_refused_by_name(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(parts, tmp_path / "run", "xattn")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    rows = str(parts / "rows.jsonl")
    for command, says in (
        (["laws", str(run), rows], "method xattn keeps an image's vectors beside the sequence"),
        (["export", str(run), "--to", "llava", "--out", str(tmp_path / "out")],
         "xattn's blocks read an image's vectors beside the sequence"),
        (["graft", str(parts / "base"), "--method", "xattn", "--vision", str(parts / "tower"),
          "--heads", "8x4/3", "--out", str(tmp_path / "out")], "cannot share 3 key heads"),
        (["graft", str(parts / "base"), "--method", "xattn", "--vision", str(parts / "tower"),
          "--gate", "row", "--out", str(tmp_path / "out")], "'tanh' or 'linear'"),
    ):  # fmt: skip
        assert mmgraft(command) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert says in told, told
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_inspect_counts_its_parts(parts: Path, tmp_path: Path, cli: Any) -> None:
    out, tower = str(tmp_path / "run"), str(parts / "tower")
    more = ("--preset", "flamingo", "--heads", "2x8", "--layers", "1,3", "--out", out)
    done = cli("graft", str(parts / "base"), "--method", "xattn", "--vision", tower, *more)
    assert done.code == 0
    told = cli("inspect", out)
    for part in ("attention", "feedforward", "gates", "marker", "projector"):
        assert any(line.startswith(part) for line in told.out.splitlines()), part
    assert "attend latest" in told.out
    assert GraftFile.read(tmp_path / "run").config["feedforward"] == "4h"
