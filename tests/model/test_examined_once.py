"""A base is examined once while it is loaded or grafted: each time takes as long as a tower."""

from __future__ import annotations

from pathlib import Path

import pytest

import mmgraft.basefiles.parts
import mmgraft.model.core
import mmgraft.model.files.load
import mmgraft.model.modeling
from mmgraft.anatomy import inspection
from mmgraft.model.modeling import GraftedModel
from tiny_runs import make_parts, make_run


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    models: list[object] = []
    real = inspection.examine

    def counted(model: object) -> object:
        models.append(model)
        return real(model)  # type: ignore[arg-type]

    homes = (
        mmgraft.model.core,
        mmgraft.basefiles.parts,
        mmgraft.model.modeling,
        mmgraft.model.files.load,
        inspection,
    )
    for home in homes:
        monkeypatch.setattr(home, "examine", counted)
    return models


def test_once_to_graft_and_once_to_load(tmp_path: Path, examined: list[object]) -> None:
    run = make_run(make_parts(tmp_path), tmp_path / "run", "iaa")
    assert len(examined) == 1
    examined.clear()
    model = GraftedModel.from_pretrained(run)
    assert examined == [model.base]
    assert model.anatomy.num_layers == model.base.config.num_hidden_layers
