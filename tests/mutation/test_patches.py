"""The list of put-in bugs does not rot: each can be put in, and its tests are there."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest

from mutation.patches import PATCHES, Patch

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "mmgraft"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.what)
def test_a_bug_can_be_put_in(patch: Patch) -> None:
    text = (PACKAGE / patch.file).read_text(encoding="utf-8")
    assert text.count(patch.old) == 1, f"{patch.file}: {patch.old!r}"
    changed = text.replace(patch.old, patch.new)
    assert changed != text
    ast.parse(changed)
    files = [word for word in shlex.split(patch.tests.partition(" -k ")[0])]
    assert files
    assert all((TESTS / file).exists() for file in files)


def test_bugs_are_put_into_every_package() -> None:
    assert len({patch.what for patch in PATCHES}) == len(PATCHES)
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    reached = {patch.file.partition("/")[0] for patch in PATCHES}
    assert packages - reached <= {"demo", "published"}
