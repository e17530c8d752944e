"""Check what one of several processes holds, against numbers that were worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmgraft import IAAConfig
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.training.memory.estimate import Estimator, Groups, Share, groups_of, not_counted, share
from mmgraft.training.memory.request import read_request
from mmgraft.training.memory.simulation import meta_model
from mmgraft.training.stages import open_stage
from tiny import HIDDEN, tiny_config
from tiny_records import tiny_record
from tiny_runs import make_parts, make_run, write_recipe

TUNE = {"name": "tune", "train": ["projector", "graft"], "lr": 1e-3, "batch_size": 2}

# A base of 10 layers of 600 bytes and embeddings of 2000, in bf16; a graft of 400 bytes in fp32.
WEIGHTS = {"bfloat16": 8000, "float32": 400}
GROUPS = Groups(layer=700, rest=2100, trained=60)


WHOLE = Share(weights=WEIGHTS, gradients=400, optimizer=800, scratch=400)


def shared(way: Any, processes: int, groups: Groups = GROUPS) -> Share:
    return share(WHOLE, groups, way, processes)


def test_one_process_holds_everything_whatever_the_recipe_says() -> None:
    for way in ("ddp", "fsdp2"):
        assert shared(way, 1) == WHOLE


def test_ddp_holds_everything_and_gradients_once() -> None:
    assert shared("ddp", 4) == WHOLE


def test_fsdp2_keeps_a_part_of_everything_and_gathers_two_layers_and_the_rest() -> None:
    """Four processes: 8000/4 and 400/4; 2100 + 2 * 700 whole; gradients 400/4, and of two groups
    2 * 4 * 60 = 480 on their way, of which there are 400 in all.
    """
    assert shared("fsdp2", 4) == Share(
        weights={"bfloat16": 2000, "float32": 100}, gradients=100, optimizer=200, scratch=100,
        gathered=3500, passing=400,
    )  # fmt: skip
    small = shared("fsdp2", 3, groups=Groups(5000, 2000, 10))
    assert small.weights == {"bfloat16": 2667, "float32": 134}  # rounded up
    assert small.gathered == 8400  # never more than there is
    assert small.passing == 80


def test_groups_are_those_of_fsdp2() -> None:
    """Counted by the names of parameters: layers and what stands at them, and all the rest."""
    record = tiny_record(**IAAConfig(layers=[1, 2], head=False).model_dump(mode="json"))
    model = meta_model(record, tiny_config("llama"), HIDDEN, torch.bfloat16)
    open_stage(model, Stage(name="s", train=["projector", "graft"], lr=1.0, workflow="mm"))
    layers: dict[str, int] = {}
    trained: dict[str, int] = {}
    rest = 0
    for name, parameter in model.named_parameters():
        words = name.split(".")
        place = ""
        if name.startswith("base.model.layers."):
            place = words[3]
        elif ".layers." in name:  # the first inserted layer stands at 1, the second at 2
            place = str(1 + int(words[words.index("layers") + 1]))
        size = parameter.numel() * parameter.element_size()
        rest += size if not place else 0
        if place:
            layers[place] = layers.get(place, 0) + size
        if parameter.requires_grad:
            trained[place] = trained.get(place, 0) + parameter.numel()
    found = groups_of(model)
    assert found == Groups(max(layers.values()), rest, max(trained.values()))
    assert set(trained) == {"1", "2", ""}


# -- whole estimates ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def request_of_one(tmp_path_factory: pytest.TempPathFactory) -> Estimator:
    parts = make_parts(tmp_path_factory.mktemp("parts"))
    run: Path = make_run(parts, parts / "run", "iaa")
    write_recipe(run, parts, "iaa", [TUNE])
    return read_request(run, length=30)


def estimated(request: Estimator, processes: int, **changes: Any) -> Any:
    stage = request.recipe.stages[0].model_copy(update=changes.pop("stage", {}))
    recipe = request.recipe.model_copy(update={**changes, "stages": [stage]})
    (found,) = replace(request, processes=processes).stages(recipe)
    return found


def test_an_estimate_adds_up_what_one_process_holds(request_of_one: Estimator) -> None:
    one = estimated(request_of_one, 1)
    ddp = estimated(request_of_one, 2)
    kept = estimated(request_of_one, 1, stage={"accumulate": 2})
    assert ddp.peak == kept.peak  # one set of gradients, which lie in DDP's buckets all the time
    for accumulate in (1, 2):
        stage = {"accumulate": accumulate}
        alone = estimated(request_of_one, 1, stage=stage)
        half = estimated(request_of_one, 2, stage=stage, parallel="fsdp2")
        assert half.weights == {name: -(-size // 2) for name, size in one.weights.items()}
        assert half.gradients == 2 * one.trained
        assert half.optimizer == 4 * one.trained
        assert half.activations == alone.activations
        assert half.moment == "forward and backward"
        sums = half.gradients if accumulate > 1 else 0
        still = sum(half.weights.values()) + half.tower + half.gathered + half.optimizer
        assert half.peak == still + sums + half.working
    many = estimated(request_of_one, 8, parallel="fsdp2")
    assert many.peak < half.peak
    assert many.tower == one.tower  # whole everywhere


def test_eager_attention_holds_the_weights_of_all_pairs(request_of_one: Estimator) -> None:
    """Two rows of 30 in 4 heads: 2 * 4 * 30 * 30 numbers in bf16 for each of 6 layers."""
    plain = estimated(request_of_one, 1, attention="sdpa")
    eager = estimated(request_of_one, 1, attention="eager")
    assert eager.activations - plain.activations > 6 * 2 * 4 * 30 * 30 * 2


@pytest.mark.parametrize(
    ("changes", "processes", "said"),
    [
        ({}, 1, []),
        ({"compile": True}, 1, ["compile: counted as without"]),
        ({"attention": "flash_attention_2"}, 1, ["flash_attention_2 is counted as sdpa"]),
        ({"parallel": "fsdp2"}, 1, ["give --processes N"]),
        ({"parallel": "fsdp2"}, 2, ["never compared with a measured peak"]),
    ],
)
def test_what_is_not_counted_is_said(changes: Any, processes: int, said: list[str]) -> None:
    recipe = Recipe.model_validate(
        {"name": "r", "method": "iaa", "stages": [TUNE]}
    ).model_copy(update=changes)  # fmt: skip
    found = not_counted(recipe, "cuda", processes)
    assert len(found) == len(said)
    assert all(words in one for words, one in zip(said, found, strict=True))
