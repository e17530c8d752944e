"""`make engines`: an environment of its own, in which nothing is left out when an engine lacks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def pins() -> dict[str, Version]:
    found: dict[str, Version] = {}
    for line in (ROOT / "engines-packages.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert "+" not in exact.version, "a local build is not to be had everywhere"
            assert canonicalize_name(pin.name) not in found, pin
            found[canonicalize_name(pin.name)] = Version(exact.version)
    return found


def test_all_that_mmgraft_needs_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pinned = pins()
    for text in [*project["dependencies"], *extras["gguf"], *extras["serve"]]:
        needed = Requirement(text)
        if needed.marker is None or needed.marker.evaluate({"python_version": "3.11"}):
            assert pinned[canonicalize_name(needed.name)] in needed.specifier, needed


def test_the_engines_agree_on_torch_and_transformers() -> None:
    pinned = pins()
    assert pinned["torch"] == Version("2.13.0")
    assert pinned["transformers"] < Version("5.20"), "vLLM takes no newer one"
    assert "xllamacpp" in pinned


def recipe(target: str) -> str:
    """Return what `make TARGET` would run, the environment being there."""
    command = ["make", "-n", "-C", str(ROOT), "--no-print-directory"]
    command += ["-o", ".venv-engines/.installed", target]
    given = {key: value for key, value in os.environ.items() if "MAKE" not in key}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=given)
    return ended.stdout.replace("\\\n", " ")


def test_it_runs_every_test_of_the_engines() -> None:
    (line,) = [line.split() for line in recipe("engines").splitlines() if "pytest" in line]
    assert {"MMGRAFT_ENGINES=1", ".venv-engines/bin/python", "tests/engines"} <= set(line)
    assert not {"-k", "-m", "--deselect"} & set(line[line.index("pytest") + 1 :])


def test_the_environment_is_made_ignored_and_cleaned() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^\.PHONY:.* engines\b", makefile, re.M)
    assert "-r engines-packages.txt" in makefile
    assert ".venv-engines/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert ".venv-engines" in recipe("clean").split()


def test_ci_runs_it() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "make engines" in lines


def test_nothing_of_it_skips() -> None:
    """A missing engine is an error of its tests, not a reason to leave them out."""
    for path in (ROOT / "tests" / "engines").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("importorskip", "skipif", "mark.skip", "pytest.skip", "xfail"):
            assert word not in text, f"{path} has {word}"


def test_the_suite_leaves_it_to_its_own_environment(tmp_path: Path) -> None:
    conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    (tmp_path / "conftest.py").write_text(conftest)
    for name in ("one", "engines"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"test_{name}.py").write_text("def test_it():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", str(tmp_path)]
    for given, wanted in (("", "1 passed"), ("1", "2 passed")):
        env = {**os.environ, "MMGRAFT_ENGINES": given}
        ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert wanted in ended.stdout.splitlines()[-1]
