"""Killed ten times, at random moments of random steps: the finished run is the undisturbed one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from same_run import same
from sessions import Kill, Server, server
from tiny_runs import make_run, write_recipe

pytestmark = pytest.mark.xdist_group("killed")

# 9 of 12 rows have a picture. Saves, logs and evaluations fall on different steps, on purpose.
# GPT-2 has dropout, so that numbers drawn twice or never would show.
ALIGN = {
    "name": "align", "train": ["projector"], "graft_active": False, "lr": 1e-3, "epochs": 1,
    "batch_size": 2,
}  # fmt: skip
TUNE = {
    "name": "tune", "train": ["projector", "graft"], "lr": {"projector": 1e-3, "default": 1e-4},
    "epochs": 2, "batch_size": 2, "accumulate": 2,
}  # fmt: skip
GROUND = {
    "name": "ground", "train": ["graft"], "workflow": "grounding", "lr": 1e-3, "max_steps": 4,
    "text_rows": "graft", "gradient_checkpointing": True,
}  # fmt: skip
WHOLE = {
    "name": "whole", "train": ["projector", "base"], "lr": 1e-4, "epochs": 2, "batch_size": 3,
    "schedule": "linear", "warmup_steps": 2,
}  # fmt: skip
LEARNERS = {
    "name": "learn", "train": ["learners.visual"], "lr": 1e-3, "epochs": 1, "batch_size": 3,
    "learners": ["visual"],
}  # fmt: skip
ROUTED = {"name": "route", "train": ["graft"], "lr": 1e-3, "epochs": 2, "batch_size": 2}

RUNS: dict[str, tuple[list[dict[str, Any]], list[int], dict[str, Any]]] = {
    # stages, how many steps each has, the rest of the recipe
    "iaa": ([ALIGN, TUNE, GROUND], [5, 6, 4], {"eval_every": 2, "keep_checkpoints": 1}),
    "llava": ([ALIGN, WHOLE], [5, 8], {"base": "full", "workers": 1}),
    "wings": ([LEARNERS, ROUTED], [3, 10], {"feature_cache": True, "precision": "bf16"}),
}
AFTER_A_STEP = 12
"""Moments up to which a kill inside of a stage waits: a save of a checkpoint has about so many."""
AT_A_BORDER = 30
"""The same at the end of a stage, where its graft is saved and its checkpoints go."""


@pytest.fixture(scope="module")
def session() -> Iterator[Server]:
    with server() as serving:
        yield serving


def make(parts: Path, run: Path, method: str, **more: Any) -> Path:
    stages, _, rest = RUNS[method]
    data = [{"path": str(parts / "rows.jsonl"), "images": str(parts / "images")}]
    make_run(parts, run, method)
    settings = {"save_every": 2, "log_every": 3, "eval_data": data, **rest, **more}
    write_recipe(run, parts, method, stages, **settings)
    return run


@pytest.fixture(scope="module")
def undisturbed(dropout_parts: Path, tmp_path_factory: Any, session: Server) -> Any:
    made: dict[str, Path] = {}

    def get(method: str) -> Path:
        if method not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            made[method] = make(dropout_parts, folder / "run", method)
            assert session.sit(made[method]) == 0
        return made[method]

    return get


def ten_kills(steps: list[int], seed: int) -> list[Kill]:
    """Seven inside of stages and three at the borders between them, in the order of the run."""
    draw = random.Random(seed)
    inside = [(stage, step) for stage, count in enumerate(steps) for step in range(1, count)]
    borders = [(stage, count) for stage, count in enumerate(steps[:-1])]
    kills = [Kill(*place, draw.randrange(AFTER_A_STEP)) for place in draw.sample(inside, 7)]
    kills += [Kill(*draw.choice(borders), draw.randrange(AT_A_BORDER)) for _ in range(3)]
    return sorted(kills)


@pytest.mark.parametrize("method", RUNS)
def test_killed_ten_times(
    method: str, dropout_parts: Path, tmp_path: Path, undisturbed: Any, session: Server
) -> None:
    run = make(dropout_parts, tmp_path / "run", method)
    steps = RUNS[method][1]
    kills = ten_kills(steps, seed=len(method))
    ends = [session.sit(run, kill) for kill in kills]
    assert ends == [-9] * 10, kills
    session.sit(run, Kill(len(steps) - 1, steps[-1], len(method) * 2))  # mostly in the last save
    assert session.sit(run) == 0
    same(run, undisturbed(method))


@pytest.mark.parametrize("moments", [2, 12, 40])
def test_a_stage_that_saves_nothing_on_its_way(
    moments: int, dropout_parts: Path, tmp_path: Path, undisturbed: Any, session: Server
) -> None:
    """Its graft may be saved when it is killed, and must not be trained a second time."""
    run = make(dropout_parts, tmp_path / "run", "wings", save_every=None)
    assert session.sit(run, Kill(0, 3, moments)) == -9
    assert session.sit(run) == 0
    same(run, undisturbed("wings"))
