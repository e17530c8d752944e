"""Training on shards: the losses of one file, resumed at the same row, features by content."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mmgraft.data.formats.indexed import RowIndex, facts_of
from mmgraft.errors import UsageError
from mmgraft.recipes.recipe import Recipe
from mmgraft.training.callbacks.stopping import TrainingStopped
from mmgraft.training.run import plan_training, train
from mmgraft.training.stage_data import check_images
from tiny_runs import losses, make_run, write_recipe

STAGES = [{"name": "tune", "train": ["projector"], "lr": 1e-3, "epochs": 2, "batch_size": 2}]


def records(parts: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (parts / "rows.jsonl").read_text().splitlines()]


def picture(parts: Path, record: dict[str, Any]) -> bytes | None:
    content = record["messages"][0]["content"]
    if isinstance(content, str):
        return None
    return (parts / "images" / content[0]["image"]).read_bytes()


def tars(parts: Path, folder: Path, spoil: str | None = None) -> str:
    """The rows in two shards."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for record in records(parts)[6 * shard : 6 * shard + 6]:
                data = picture(parts, record)
                if data is not None:
                    record["messages"][0]["content"][0] = {"type": "image"}
                    data = data[:40] if record["id"] == spoil else data
                members = {"png": data, "json": json.dumps(record).encode()}
                for ending, content in members.items():
                    if content is not None:
                        member = tarfile.TarInfo(f"{record['id']}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return str(folder / "{0..1}.tar")


def parquet(parts: Path, folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    folder.mkdir()
    rows = []
    for record in records(parts):
        data = picture(parts, record)
        rows.append(
            {
                "id": record["id"],
                "messages": json.dumps(record["messages"]).replace(
                    f'"image": "{record["id"]}.png"', '"index": 0'
                ),
                "image": None if data is None else {"bytes": data, "path": None},
            }
        )
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "rows.parquet"))
    return str(folder)


def make(parts: Path, run: Path, path: str | None, **recipe: Any) -> Path:
    make_run(parts, run, "llava")
    data = {} if path is None else {"data": [{"path": path}]}
    write_recipe(run, parts, "llava", STAGES, **{"save_every": 1, **data, **recipe})
    return run


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            control.should_save = control.should_training_stop = True


def same(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    mine, wanted = load_file(run / "graft.safetensors"), load_file(other / "graft.safetensors")
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory) -> Path:
    """Trained on one file, with the pictures beside it."""
    run = make(parts, tmp_path_factory.mktemp("whole") / "run", None)
    train(plan_training(run))
    return run


def test_a_run_on_tars_is_the_same_and_goes_on_at_the_same_row(parts, tmp_path, whole):
    path = tars(parts, tmp_path / "shards")
    run = make(parts, tmp_path / "run", path, workers=1)
    with pytest.raises(TrainingStopped):
        train(plan_training(run), display=lambda *_: [Stop()])
    torch.manual_seed(99)
    plan = plan_training(run, resume=True)
    assert isinstance(plan.rows[0], RowIndex)
    train(plan)
    same(run, whole)


def test_a_run_on_parquet_is_the_same_and_finds_features_by_content(
    parts, tmp_path, whole, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cache = str(tmp_path / "features")
    first = make(parts, tmp_path / "first", None, feature_cache=cache)
    train(plan_training(first))
    shards = sorted((tmp_path / "features").rglob("*.safetensors"))
    for name, path in (("table", parquet(parts, tmp_path / "rows")),
                       ("tars", tars(parts, tmp_path / "shards"))):  # fmt: skip
        run = make(parts, tmp_path / name, path, feature_cache=cache)
        train(plan_training(run))
        same(run, first)
    assert sorted((tmp_path / "features").rglob("*.safetensors")) == shards  # computed once
    plain = make(parts, tmp_path / "plain", parquet(parts, tmp_path / "again"))
    train(plan_training(plain))
    same(plain, whole)


def test_a_spoilt_picture_in_a_shard_is_named_or_left_out(parts, tmp_path):
    path = tars(parts, tmp_path / "shards", spoil="1")
    with pytest.raises(UsageError, match=r"0\.tar, sample 2 \(id 1\): .*0\.tar/1\.png"):
        plan_training(make(parts, tmp_path / "error", path))
    for cached in (False, True):
        run = make(parts, tmp_path / f"skip{cached}", path, on_bad_row="skip", feature_cache=cached)
        (result,) = train(plan_training(run))
        assert result.bad_rows == 1
        (line,) = map(json.loads, (run / "bad_rows.jsonl").read_text().splitlines())
        assert (line["place"], line["fault"]) == ("sample 2", "broken")


def test_a_share_of_image_rows_is_what_a_stage_shows(parts, tmp_path):
    run = make(parts, tmp_path / "run", None, text_rows="graft", image_share=0.5)
    plan = plan_training(run)
    assert facts_of(plan.rows[0]).with_image.tolist().count(True) == 6  # of 12; 9 of them else
    assert check_images(plan.rows[0]) == 6
    stage = {**STAGES[0], "image_share": 0.25}
    kept = {"name": "r", "method": "llava", "text_rows": "graft", "image_share": 0.5}
    recipe = Recipe.model_validate({**kept, "stages": [stage, {**STAGES[0], "name": "more"}]})
    assert [one.image_share for one in recipe.resolved().stages] == [0.25, 0.5]
    with pytest.raises(ValueError, match=r"image_share: 0.5 mixes .* text_rows: skip leaves them"):
        Recipe.model_validate({**kept, "text_rows": None, "stages": STAGES})
