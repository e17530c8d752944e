"""`mmgraft eval` of boxes: a grounding workflow is asked by name, and the sheet is left to see."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from box_example import GPL, make_boxes
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.hub.push import plan_push
from mmgraft.model.files.create import create_graft
from refusals import on_the_hub


@pytest.fixture
def grounded(parts: Path, here: Path) -> Path:
    """A run whose one workflow is `grounding`, and a set of GPL pictures in `sets.yaml`."""
    base, tower = str(parts / "base"), str(parts / "tower")
    config = IAAConfig.model_validate({"layers": [1, 2], "embedding": False, "head": False})
    create_graft(base, tower, config, here / "grounded", workflow="grounding")
    spec = make_boxes(here / "set", GPL).model_copy(update={"max_new_tokens": 3})
    listed = spec.model_dump(mode="json", exclude_defaults=True)
    (here / "sets.yaml").write_text(yaml.safe_dump({"evaluation": [listed]}))
    return here / "grounded"


def test_the_grounding_workflow_is_asked_and_its_sheet_shown(cli, grounded: Path) -> None:
    asked = ["eval", grounded, "--vision", "--sets", "sets.yaml", "--workflow", "grounding"]
    ran = cli(*asked)
    assert ran.code == 0, ran.err
    (one,) = json.loads((grounded / "results" / "vision.json").read_text())["sets"]
    assert one["settings"]["workflow"] == "grounding"
    assert one["sheet"] == "results/sheets/things.png"
    assert "sheets/things.png" in ran.err.replace("\n", "")
    html = (grounded / "results" / "report.html").read_text()
    assert '<img src="sheets/things.png"' in html
    assert "data:image/png" not in html
    shutil.rmtree(grounded / "results" / "sheets")
    assert cli(*asked).code == 0
    assert (grounded / one["sheet"]).is_file(), "drawn again from the kept answers"
    on_the_hub(grounded)
    sent = {file.name for file in plan_push(grounded).files}
    assert "results/report.html" in sent
    assert one["sheet"] not in sent


def test_a_run_without_that_workflow_is_refused_by_name(cli, run: Path, grounded: Path) -> None:
    ran = cli("eval", run, "--vision", "--sets", "sets.yaml", "--workflow", "grounding")
    assert ran.code == 2
    assert "workflow 'grounding' is not there; this graft has: mm" in " ".join(ran.err.split())
    assert not (run / "results").exists()
    sets = yaml.safe_load(Path("sets.yaml").read_text())
    sets["evaluation"][0]["workflow"] = "grounding"
    Path("sets.yaml").write_text(yaml.safe_dump(sets))
    ran = cli("eval", run, "--vision", "--sets", "sets.yaml")
    assert ran.code == 2
    assert "'things'" in ran.err
    assert "'grounding'" in ran.err
