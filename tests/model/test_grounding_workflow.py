"""A workflow `grounding` beside a workflow `mm`: one base, two grafts, neither in the other's way.

Both are IAA grafts, as section 3.1 of the paper (arXiv 2408.12902) has them; the second one has
the settings of `recipes/grounding.yaml`, its layers moved into a base of four.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from box_example import make_boxes
from grafting import batch, distance, logits_of, own, perturb, plain, rows, text_of
from mmgraft import GraftedModel, IAAConfig
from mmgraft.evaluation.vision import evaluate_vision
from mmgraft.inference import Answerer
from mmgraft.model import modeling
from mmgraft.model.files.create import create_graft
from mmgraft.model.files.save import save_graft
from mmgraft.recipes.source import find_recipe, load_recipe
from tiny_runs import make_parts

LAYERS = {"mm": [1, 2], "grounding": [0, 3]}
GRAFTS = ("mm", "grounding")
TOWER_WIDTH = 16


def make_graft(parts: Path, workflow: str) -> None:
    """`mm` with its own embedding, `grounding` by the recipe; both changed as by a training."""
    recipe = load_recipe(find_recipe("grounding"))
    assert recipe.workflow == "grounding"
    assert recipe.method == "iaa"
    settings = {**recipe.graft.config, "layers": LAYERS[workflow]}
    if workflow == "mm":
        settings |= {"embedding": True}
    config = IAAConfig.model_validate(settings)
    folder = parts / workflow
    create_graft(
        str(parts / "base"), str(parts / "tower"), config, folder, workflow=workflow,
        projector=recipe.graft.projector,
    )  # fmt: skip
    save_graft(perturb(GraftedModel.from_pretrained(folder), seed=len(workflow)), folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_parts(tmp_path_factory.mktemp("two"))
    for workflow in GRAFTS:
        make_graft(folder, workflow)
    return folder


@pytest.fixture(scope="module")
def both(parts: Path) -> GraftedModel:
    model = GraftedModel.from_pretrained(parts / "mm")
    model.add_workflow("grounding", parts / "grounding")
    return model


def inputs(*words: str) -> dict[str, torch.Tensor]:
    made = batch(rows(*words), "left")
    if "image_features" in made:
        made["image_features"] = made["image_features"][..., :TOWER_WIDTH]
    return made


def test_each_workflow_beside_the_other_is_itself_alone(parts: Path, both: GraftedModel) -> None:
    seen = inputs("ttiiiittttt", "iiiitttiiiit")
    found = {name: logits_of(both, seen, workflow=name) for name in GRAFTS}
    for name in GRAFTS:
        alone = GraftedModel.from_pretrained(parts / name)
        assert torch.equal(found[name], logits_of(alone, seen))
    assert distance(found["mm"], found["grounding"]) > 1e-2
    assert both.names == ["mm", "grounding"]
    assert torch.equal(logits_of(both, seen), found["mm"]), "the first one is the default"


def test_each_workflow_has_its_own_processor(
    both: GraftedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load_processor(record: Any, folder: Any, tower: Any, options: Any) -> Any:
        asked.append((record, folder, tower, options))
        return SimpleNamespace(answers=record.workflow)

    monkeypatch.setattr(modeling.load, "load_processor", load_processor)
    monkeypatch.setattr(both, "answers", None)
    for name in (None, "grounding", "mm"):
        both.processor("a/folder", workflow=name, options={"brief": True})
        chosen = both.workflow(name or "mm")
        assert asked[-1] == (chosen.record, "a/folder", both.vision_tower, {"brief": True})
        assert both.answers == chosen.record.workflow
    assert asked[0] != asked[1]


def test_text_is_the_bases_bit_for_bit(both: GraftedModel) -> None:
    texts = inputs("ttttttttttttt", "tttttttt")
    expected = logits_of(plain("llama"), texts)
    assert torch.equal(logits_of(both, texts), expected)
    assert torch.equal(logits_of(both, texts, workflow="text"), expected)
    # A row of text that is given to a workflow runs through its layers.
    assert not torch.equal(logits_of(both, texts, workflow="grounding"), expected)


def test_rows_of_both_workflows_and_text_stand_in_one_batch(both: GraftedModel) -> None:
    words = ("ttiiiittttt", "ttiiiittttttt", "tttttttt")
    names = ["mm", "grounding", "text"]
    mixed = inputs(*words)
    found = own(logits_of(both, mixed, workflow=names), mixed)
    every = {name: own(logits_of(both, mixed, workflow=name), mixed) for name in GRAFTS}
    assert distance(found[0], every["mm"][0]) < 1e-5
    assert distance(found[1], every["grounding"][1]) < 1e-5
    alone = text_of(batch([rows(*words)[2]]))
    assert distance(found[2], logits_of(plain("llama"), alone)[0]) < 1e-5


def test_both_are_asked_for_boxes_and_answer_as_they_do_alone(
    parts: Path, both: GraftedModel, tmp_path: Path
) -> None:
    """The sheet lies in the run that was asked, and predictions of the two are not mixed up."""
    spec = make_boxes(tmp_path / "set").model_copy(update={"max_new_tokens": 4})
    said = {}
    for name in GRAFTS:
        alone, beside = (
            Path(shutil.copytree(parts / name, tmp_path / f"{name}-{how}"))
            for how in ("alone", "beside")
        )
        one = Answerer.load(parts / name)
        evaluate_vision(one, alone, [spec])
        together = Answerer(both, one.processor)
        (found,) = evaluate_vision(together, beside, [spec], workflow=name).sets
        assert found.settings["workflow"] == name
        assert found.scores["malformed"].count == 3
        assert found.sheet == "results/sheets/things.png"
        assert (beside / found.sheet).is_file()
        file = "results/predictions/things.jsonl"
        lines = [(folder / file).read_text().splitlines()[1:] for folder in (alone, beside)]
        assert lines[0] == lines[1]
        said[name] = lines[0]
    assert said["mm"] != said["grounding"]
