"""`make oldest`: the transformers that pyproject.toml allows at least, in CI."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from tiny import ARCHITECTURES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def oldest() -> Version:
    lines = (ROOT / "oldest-packages.txt").read_text(encoding="utf-8").splitlines()
    (pin,) = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert pin.name == "transformers"
    (exact,) = pin.specifier
    assert exact.operator == "=="
    return Version(exact.version)


def floor() -> Version:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [Requirement(text) for text in project["dependencies"]]
    (bound,) = next(line for line in declared if line.name == "transformers").specifier
    return Version(bound.version)


def test_the_oldest_that_is_tried_is_the_oldest_that_is_allowed() -> None:
    assert oldest() == floor()


def test_the_floor_lets_in_the_environments_that_serve_exports() -> None:
    assert floor() <= Version("5.19"), "vLLM's environment holds 5.19"


def test_this_process_has_the_transformers_that_it_was_started_for() -> None:
    """In `make oldest` the pinned one, from its own folder, with the project's torch."""
    found = Version(transformers.__version__)
    if os.environ.get("MMGRAFT_OLDEST") != "1":
        assert found >= floor()
        return
    assert found == oldest()
    prefix = Path(sys.prefix).resolve()
    assert Path(transformers.__file__).resolve().is_relative_to(prefix)
    assert not Path(torch.__file__).resolve().is_relative_to(prefix)


def recipe(target: str) -> str:
    """Return what `make TARGET` would run, the environments being there."""
    made = (".venv/.installed", ".venv-oldest/.installed", ".venv/.test-installed")
    old = [word for file in made for word in ("-o", file)]
    command = ["make", "-n", "-C", str(ROOT), "--no-print-directory", *old, target]
    given = {key: value for key, value in os.environ.items() if "MAKE" not in key}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=given)
    return ended.stdout.replace("\\\n", " ")


def test_ci_runs_it() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "make oldest" in lines


def test_the_environment_is_made_ignored_and_cleaned() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^\.PHONY:.* oldest\b", makefile, re.M)
    assert "-r oldest-packages.txt" in makefile
    assert ".venv-oldest/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert ".venv-oldest" in recipe("clean").split()


@pytest.fixture(scope="module")
def calls() -> list[list[str]]:
    """The words of each call of pytest in `make oldest`."""
    lines = [line for line in recipe("oldest").splitlines() if "-m pytest" in line]
    assert all(".venv-oldest/bin/python" in line for line in lines)
    assert all("MMGRAFT_OLDEST=1" in line.split() for line in lines)
    return [line.split() for line in lines]


def test_every_test_that_it_names_is_there(calls: list[list[str]]) -> None:
    named = [word for call in calls for word in call if word.startswith("tests/")]
    assert {
        "tests/test_oldest.py",
        "tests/test_reference_golden.py",
        "tests/published/test_official_parity.py",
        "tests/vision",
        "tests/export/test_llava_stock.py",
        "tests/model/test_seen_features.py",
        "tests/model/test_cache.py",
        "tests/training/test_resume.py",
    } <= set(named)
    every = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/model/test_invariants_*.py")}
    assert every <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_its_architectures_are_some_of_the_matrix() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"^OLDEST_BASES := (.+)$", makefile, re.M)
    assert found
    names = found[1].split(" or ")
    assert len(names) >= 4
    assert set(names) <= set(ARCHITECTURES)
