"""The page on evaluation: its sets are read, its tasks run, its schema is the one in the code."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from mmgraft.evaluation.items.files import read_items
from mmgraft.evaluation.metrics.boxes import format_box
from mmgraft.recipes.evaluation_set import BoxFormat, Metric, SetSpec
from mmgraft.runs.results import Results, Score, SetResult

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from console import prepare, read_blocks, run_command  # noqa: E402

TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("play")
    prepare(TEXT, folder)
    return folder


def specs(folder: Path) -> list[SetSpec]:
    found = yaml.safe_load((folder / "sets.yaml").read_text())["evaluation"]
    return [SetSpec.model_validate(one) for one in found]


def test_every_metric_has_a_set_whose_rows_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = specs(folder)
    shown = {spec.metric for spec in found} | {"exact"}  # read as vqa is
    assert shown == set(get_args(Metric))
    monkeypatch.chdir(folder)
    for spec in found:
        items = read_items(spec)
        assert items
        assert all(item.has_image for item in items) is (spec.modality == "image")


def test_the_box_of_the_page_is_written_as_it_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (item,) = read_items(next(spec for spec in specs(folder) if spec.metric == "box"))
    assert item.box is not None
    assert item.size is not None
    formats: list[BoxFormat] = ["unit", "thousand", "ten", "pixel", "cogvlm", "qwen"]
    for boxes in formats:
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{boxes}` |"))
        assert f"`{format_box(item.box, boxes, item.size)}`" in row


@pytest.mark.parametrize("model", [SetSpec, Results, SetResult, Score], ids=lambda m: m.__name__)
def test_every_key_is_told(model: type[SetSpec | Results | SetResult | Score]) -> None:
    told = set(re.findall(r"`([a-z0-9_]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)))
    assert set(model.model_fields) <= told


def test_the_shown_results_are_of_the_schema() -> None:
    shown = [
        block.text
        for block in read_blocks(TEXT)
        if block.language == "json" and "schema_version" in block.text
    ]
    assert len(shown) == 1
    data = json.loads(shown[0])
    found = Results.parse(data, "evaluation.md")
    # No key is left out, so that the example is the whole schema.
    assert found.model_dump(mode="json") == data


def test_the_shown_tasks_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    graft = "mmgraft graft tiny-llama --method iaa --layers 1,3 --vision tiny-clip --json"
    assert run_command(graft, folder).exit_code == 0
    ran = run_command("python ask_harness.py", folder)
    lines = [line for line in ran.printed if re.match(r"\w+ (mm|text) \d\.\d{3} \(", line)]
    assert ran.exit_code == 0
    assert [line.split()[:2] for line in lines] == [
        ["colours_seen", "mm"],
        ["facts_by_the_harness", "text"],
    ]
