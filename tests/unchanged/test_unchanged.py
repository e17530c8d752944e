"""The code does what it did when it was recorded: to the bit under the same conditions.

A number that a rewrite moves shows here, however small it is; so does a tensor, a file, a token or
a key that is gone, new or called otherwise. `record.py` records anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unchanged import conditions, golden_logits, templates, training, written
from unchanged.changed import CHANGED_FILES, compared
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
    for step, recorded in RECORDINGS["files"][case].items():
        for files in (now.get(step, {}), recorded):
            files.update({n: compared(n, one, recorded.get(n)) for n, one in files.items()})
    check("files", case, now)


def test_every_changed_key_has_its_reason() -> None:
    assert all(len(why.split()) > 2 for keys in CHANGED_FILES.values() for why in keys.values())


@pytest.mark.parametrize(
    ("name", "content", "left"),
    [
        ("push/graft_config.json", {"method": "a", "recipe sha256": "1"}, {"method": "a"}),
        ("graft_config.json", {"config": {"rank": 4, "router_width": 9}}, {"config": {"rank": 4}}),
        ("graft_config.json", {"vision": {"options": {}}}, {"vision": {"options": {}}}),
        ("recipe.used.yaml", ["seed: 7", "- router: null", "  lr: 1"], ["seed: 7", "  lr: 1"]),
        ("README.md", ["---", "license: mit", "---", "words"], ["---", "license: mit"]),
        ("README.md", {"length": 3, "sha256": "1"}, None),
        ("metrics.jsonl", [{"router": 1}], [{"router": 1}]),
        (
            "export/graft_config.json",
            "as in train/graft_config.json",
            "as in train/graft_config.json",
        ),
    ],
)
def test_only_changed_keys_are_left_out(name: str, content: Any, left: Any) -> None:
    assert compared(name, content) == left
