"""A graft is noticed whose tower gives other features than those it was made with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from mmgraft.errors import UsageError
from mmgraft.model.files.graft_file import CONFIG_NAME
from mmgraft.model.modeling import GraftedModel
from tiny_runs import make_parts, make_run


def test_features_of_another_layer_are_refused_by_the_versions(tmp_path: Path) -> None:
    fresh = make_run(make_parts(tmp_path), tmp_path / "fresh", "iaa")
    run = tmp_path / "run"
    GraftedModel.from_pretrained(fresh).save_pretrained(run)
    record = json.loads((run / CONFIG_NAME).read_text())
    assert record["vision_features"]["transformers"] == transformers.__version__
    assert GraftedModel.from_pretrained(run, dtype="bfloat16").vision_tower is not None

    record["vision_features"] = {
        "sample": [1.05 * one for one in record["vision_features"]["sample"]],
        "transformers": "5.20.2",
    }
    (run / CONFIG_NAME).write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"5% apart; transformers 5\.20\.2 then.*train again"):
        GraftedModel.from_pretrained(run)
    model = GraftedModel.from_pretrained(run, verify="off")
    with pytest.raises(UsageError, match="gives other features"):
        model.add_workflow("other", run)

    record["vision_features"] = None  # as earlier versions of mmgraft wrote it
    (run / CONFIG_NAME).write_text(json.dumps(record))
    assert GraftedModel.from_pretrained(run).names == model.names
