"""A graft to spoil, and `refused`: a command must end with 2 and leave everything as it was.

`conftest.py` of `tests/cli` hands these fixtures on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub_fixtures import contents
from tiny_runs import make_parts, make_run, write_recipe

STAGE = {"name": "align", "train": ["projector"], "lr": 1e-3, "batch_size": 2, "max_steps": 4}
GRAFT = ["--method", "iaa", "--layers", "1,2"]
"""Options that are right."""


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a tower, rows, and a fresh graft that tests copy."""
    folder = make_parts(tmp_path_factory.mktemp("parts"))
    write_recipe(make_run(folder, folder / "fresh", "iaa"), folder, "iaa", [STAGE])
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(parts: Path, here: Path) -> Path:
    """A graft in the current folder, with a recipe."""
    return Path(shutil.copytree(parts / "fresh", here / "run"))


@pytest.fixture
def refused(cli: Callable[..., Any], here: Path) -> Callable[..., str]:
    """Run a command that must end with 2 and leave the current folder as it was."""

    def call(*args: object) -> str:
        before = contents(here)
        folders = sorted(here.rglob("*"))
        ran = cli(*args)
        assert ran.code == 2, (ran.code, ran.out, ran.err)
        assert "Traceback" not in ran.err
        assert ran.err.startswith("error: ") or "\nerror: " in ran.err or "Usage: " in ran.err
        assert contents(here) == before
        assert sorted(here.rglob("*")) == folders
        return ran.err

    return call


def change(run: Path, **values: Any) -> None:
    """Replace fields of the graft's record."""
    record = json.loads((run / "graft_config.json").read_text())
    (run / "graft_config.json").write_text(json.dumps({**record, **values}))


def on_the_hub(run: Path) -> None:
    """Name base and tower by ids, so that nothing else is in the way of a push."""
    base = json.loads((run / "graft_config.json").read_text())["base"]
    change(run, base={**base, "id": "a/base", "revision": "c" * 40}, vision={"id": "a/tower"})
