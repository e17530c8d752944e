"""The code does what it did when it was recorded: to the bit under the same conditions.

A number that a rewrite moves shows here, however small it is; so does a tensor, a file, a token or
a key that is gone, new or called otherwise. `record.py` records anew.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from unchanged import conditions, golden_logits, templates, training, written
from unchanged.changed import CHANGED_FILES
from unchanged.comparing import TOLERANCE, differences, read
from unchanged.parts import make_parts

KINDS = ("training", "golden", "templates", "files")
RECORDINGS = {kind: read(kind) for kind in KINDS}
EXACT = read("made_with") == conditions.present()

_MOST = 25


def check(kind: str, case: str, now: Any, tolerance: float = TOLERANCE) -> None:
    recorded = RECORDINGS[kind][case]
    found = list(differences(recorded, now, EXACT, tolerance))
    told = [*found[:_MOST], *[f"and {len(found) - _MOST} more"] * (len(found) > _MOST)]
    how = "to the bit" if EXACT else f"within {tolerance:g}"
    if found:
        pytest.fail(f"{kind}, {case}, compared {how}:\n" + "\n".join(told), pytrace=False)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("unchanged") / "parts")


@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("training", training.CASES),
        ("templates", templates.CASES),
        ("files", written.CASES),
        ("golden", golden_logits.cases() or RECORDINGS["golden"]),
    ],
)
def test_every_case_is_recorded(kind: str, cases: Any) -> None:
    assert list(RECORDINGS[kind]) == list(cases)


def with_marks(case: str) -> Any:
    if not case.endswith(training.TWO):
        return case
    # One server of forks, which has imported everything, is enough for all of them.
    return pytest.param(case, marks=[pytest.mark.slow, pytest.mark.xdist_group("unchanged ranks")])


@pytest.mark.parametrize("case", [with_marks(case) for case in training.CASES])
def test_training(case: str, parts: Path, tmp_path: Path) -> None:
    way = case.partition("-")[2]
    check("training", case, training.record(parts, tmp_path, case), training.tolerance(way))


@pytest.mark.skipif(not golden_logits.there(), reason="set MMGRAFT_GOLDEN")
@pytest.mark.parametrize("case", RECORDINGS["golden"])
def test_golden_logits(case: str, tmp_path: Path) -> None:
    check("golden", case, golden_logits.record(tmp_path, case))


@pytest.mark.parametrize("case", templates.CASES)
def test_templates(case: str) -> None:
    check("templates", case, templates.record(case))


@pytest.mark.parametrize("case", written.CASES)
def test_files(case: str, parts: Path, tmp_path: Path) -> None:
    now = written.record(parts, tmp_path, case)
    for files in (*RECORDINGS["files"][case].values(), *now.values()):
        for name in list(files):
            if any(fnmatchcase(name, pattern) for pattern in CHANGED_FILES):
                del files[name]
    check("files", case, now)


def test_every_changed_file_has_its_reason() -> None:
    assert all(len(reason.split()) > 2 for reason in CHANGED_FILES.values())
