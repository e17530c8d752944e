from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmgraft.evaluation.origin import described_graft, weights_sha256
from mmgraft.inference import Answerer
from mmgraft.runs.packages import versions_of
from tiny_runs import make_parts, make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(make_parts(tmp_path / "parts"), tmp_path / "run", "wings")


def test_a_graft_is_described_by_its_record_and_weights(run: Path) -> None:
    found = described_graft(Answerer.load(run).model, run)
    assert found == {
        "method": "wings",
        "workflow": "mm",
        "base": "base",
        "vision": "tower",
        "sha256": weights_sha256(run),
    }


@pytest.mark.parametrize("name", ["graft.safetensors", "base/model.safetensors"])
def test_other_weights_have_another_sum(run: Path, name: str) -> None:
    before = weights_sha256(run)
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((path.read_bytes() if path.is_file() else b"") + b"\0")
    assert weights_sha256(run) != before


def test_settings_count_and_what_was_measured_does_not(run: Path) -> None:
    before, path = weights_sha256(run), run / "graft_config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "results": {"accuracy": 1}, "recipe": {"seed": 1}}))
    (run / "metrics.jsonl").write_text("{}\n")
    assert weights_sha256(run) == before
    path.write_text(json.dumps({**record, "state": {"active": False}}))
    assert weights_sha256(run) != before


def test_versions_are_those_of_what_is_installed() -> None:
    found = versions_of(["torch", "no-such-package-here", "numpy"])
    assert list(found) == ["torch", "numpy"]
    assert all(found.values())
