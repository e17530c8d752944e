from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mmgraft.cli.env import DEMO_PACKAGES
from mmgraft.demo.assets import GEMMA

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(file: str) -> list[Requirement]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]
    return [Requirement(text) for text in texts if not text.startswith("mmgraft")]


def test_users_get_lower_bounds_only() -> None:
    for requirement in declared():
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement


def test_the_constraints_pin_what_is_declared_within_its_bounds() -> None:
    pins: dict[str, list[str]] = {}
    for pin in requirements("constraints.txt"):
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert "+" not in exact.version, "a local build is not to be had everywhere"
        pins.setdefault(canonicalize_name(pin.name), []).append(exact.version)
    for requirement in declared():
        versions = pins.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement.name} has no pin"
        assert all(version in requirement.specifier for version in versions), requirement


def test_the_demo_packages_are_those_that_env_looks_for() -> None:
    assert {pin.name for pin in requirements("demo-packages.txt")} == set(DEMO_PACKAGES)


def test_the_test_packages_are_those_that_are_assembled() -> None:
    assert [pin.name for pin in requirements("test-packages.txt")] == [p.name for p in GEMMA]


def test_every_third_party_import_is_declared() -> None:
    found: set[str] = set()
    for path in (ROOT / "mmgraft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    modules = {"PIL": "pillow", "yaml": "pyyaml", "tomllib": "tomli"}
    modules["markdown_it"] = "markdown-it-py"
    names = {canonicalize_name(modules.get(name, name)) for name in found - {"mmgraft"}}
    names -= {canonicalize_name(name) for name in sys.stdlib_module_names}
    known = {text.name for text in (*declared(), *requirements("demo-packages.txt"))}
    assert names <= {canonicalize_name(name) for name in known}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built and unpacked where nothing of the checkout can be reached."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_carries_its_data(installed: Path) -> None:
    for name in ("aliases.toml", "py.typed", "hub/card.md.jinja", "evaluation/report/run.md.jinja"):
        assert (installed / "mmgraft" / name).is_file(), name
    shipped = {path.name for path in (installed / "mmgraft" / "recipes" / "shipped").iterdir()}
    assert shipped == {path.name for path in (ROOT / "recipes").iterdir()}
    assert not (installed / "tests").exists()
    (info,) = installed.glob("mmgraft-*.dist-info")
    assert "mmgraft = mmgraft.cli.app:main" in (info / "entry_points.txt").read_text()
    assert (info / "licenses" / "LICENSE").is_file()


def test_the_wheel_runs_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import mmgraft.aliases, mmgraft.recipes.source as r\n"
        "print(r.recipe_dir()); print(mmgraft.aliases.default_tower())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert ran.stdout.splitlines()[0] == str(installed / "mmgraft" / "recipes" / "shipped")
