"""Two ranks compute what one process does with the same global batch, and cannot hang.

The rows are set so that the first rank gets only rows with images (some with two), the second only
text, and an epoch ends in the middle of a batch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from mmgraft.data.batches.sampler import EpochSampler
from mmgraft.training.run import plan_training, train
from mmgraft.vision.projectors.configs import PerceiverConfig
from rank_work import apart, train_runs
from ranks import on_ranks
from tiny_runs import losses, make_run, write_recipe
from waiting import LAST

BATCH = 2
STAGES: dict[str, list[dict[str, Any]]] = {
    "iaa": [{"name": "tune", "train": ["projector", "graft"], "max_steps": 30}],
    "wings": [{"name": "tune", "train": ["projector", "graft"], "max_steps": 200}],  # fsdp2: 30
    "lora": [{"name": "tune", "train": ["projector", "graft"], "max_steps": 30}],
    "expert": [{"name": "tune", "train": ["projector", "graft"], "max_steps": 30}],
    "xattn": [{"name": "tune", "train": ["projector", "graft"], "max_steps": 30}],
    "llava": [
        {"name": "align", "train": ["projector"], "text_rows": "graft", "max_steps": 10},
        {"name": "tune", "train": ["projector", "base"], "text_rows": "base", "max_steps": 20},
    ],
}

PROJECTORS = {"lora": PerceiverConfig(latents=4, layers=1, heads=2, head_dim=4)}
"""Projectors off the default, which is ``mlp``."""


@pytest.fixture(scope="module")
def rows(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bool]]:
    """Seven rows with images, two of them with two, and six of text; and which have an image."""
    given = [json.loads(line) for line in (parts / "rows.jsonl").read_text().splitlines()]
    shown = [row for row in given if isinstance(row["messages"][0]["content"], list)][:7]
    texts = [row for row in given if isinstance(row["messages"][0]["content"], str)] * 2
    for row, other in ((shown[0], shown[1]), (shown[4], shown[2])):
        row["messages"][0]["content"].insert(1, other["messages"][0]["content"][0])
    lines = [{**row, "id": str(at)} for at, row in enumerate([*shown, *texts])]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file, [at < len(shown) for at in range(len(lines))]


def evaluated(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def stored(run: Path) -> list[str]:
    """Keys of all features in a run's cache."""
    keys: list[str] = []
    for shard in (run / "features").rglob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            keys += json.loads(file.metadata()["keys"])
    return keys


@pytest.mark.slow
@pytest.mark.parametrize("method", ["iaa", "wings", "llava", "lora", "expert", "xattn"])
def test_two_ranks_are_one(
    parts: Path,
    rows: tuple[Path, list[bool]],
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
):
    file, with_image = rows
    own = {"embedding": True, "head": True} if method == "iaa" else {}
    runs = {}
    for name in ("one", "ddp", "fsdp2"):
        runs[name] = make_run(parts, tmp_path / name, method, PROJECTORS.get(method), **own)
        stages = [
            {
                "text_rows": "graft",
                "lr": 1e-3,
                "schedule": "constant",
                "batch_size": BATCH,
                "accumulate": 2 if name == "one" else 1,
                **stage,
                "max_steps": min(stage["max_steps"], 30 if name == "fsdp2" else 200),
            }
            for stage in STAGES[method]
        ]
        more = {"parallel": name} if name != "one" else {}
        more = {**more, "base": "full", "feature_cache": True} if method == "llava" else more
        data = [{"path": str(file), "images": str(parts / "images")}]
        more = {**more, "eval_data": data, "eval_every": 15}
        write_recipe(runs[name], parts, method, stages, data=data, save_every=None, **more)
    monkeypatch.setattr(EpochSampler, "__iter__", EpochSampler.__iter__)
    apart(BATCH, with_image)
    train(plan_training(runs["one"], device="cpu"))
    found = on_ranks(train_runs, [str(runs["ddp"]), str(runs["fsdp2"])], BATCH, with_image)
    for of_ddp, of_fsdp2 in found:
        assert set(of_ddp.values()) == {False}
        assert set(of_fsdp2.values()) == {True}, "a trained parameter was whole"
    if method == "llava":
        assert len(stored(runs["one"])) == len(set(stored(runs["one"])))
        for name in ("ddp", "fsdp2"):
            assert sorted(stored(runs[name])) == sorted(stored(runs["one"])), "computed twice"
    wanted = losses(runs["one"])
    assert len(wanted) == sum(stage["max_steps"] for stage in STAGES[method])
    for name, count in (("ddp", len(wanted)), ("fsdp2", 30)):
        mine = losses(runs[name])
        assert [each[:2] for each in mine] == [each[:2] for each in wanted[:count]]
        first = [loss for *_, loss in wanted[:30]]
        assert [loss for *_, loss in mine[:30]] == pytest.approx(first, abs=1e-4), name
        assert mine[-1][2] == pytest.approx(wanted[count - 1][2], abs=1e-2), name
        first = evaluated(runs["one"])[:2]  # 13 rows are no whole number of batches here either
        assert first
        assert evaluated(runs[name])[: len(first)] == pytest.approx(first, abs=1e-4), name


@pytest.mark.slow
def test_the_command_starts_them_itself(parts: Path, tmp_path: Path):
    """And accelerate's FSDP, which would train with DDP on a CPU, is refused by each."""
    run = make_run(parts, tmp_path / "run", "llava")
    stage = {"name": "align", "train": ["projector"], "lr": 1e-3, "max_steps": 2}
    write_recipe(run, parts, "llava", [stage], parallel="fsdp2")
    command = [sys.executable, "-m", "mmgraft", "train", str(run), "--processes", "2"]

    def start(*more: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--device", "cpu", *more],
            capture_output=True,
            text=True,
            timeout=LAST,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    done = start("--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"][0]["steps"] == 2
    assert [step for _, step, _ in losses(run)] == [1, 2]
    refused = start("--restart", ACCELERATE_USE_FSDP="true")
    assert refused.returncode == 2
    assert refused.stderr.count("parallel=fsdp2") == 1, refused.stderr
