"""A stage opened on a model: what trains, at which rate, through which path."""

from __future__ import annotations

import pytest
import torch

from mmgraft.errors import UsageError
from mmgraft.grafts.registry import get_method
from mmgraft.model.modeling import GraftedModel
from mmgraft.recipes.recipe import Stage, stage_class
from mmgraft.training.stages import open_stage
from tiny import tiny_model
from tiny_towers import tiny_tower


def grafted(method: str, **config) -> GraftedModel:
    settings = get_method(method).config_class.model_validate(config)
    return GraftedModel.graft(tiny_model("llama"), tiny_tower(), settings)


def stage(**values) -> Stage:
    wings = {"learners", "router"} & values.keys()
    made = stage_class(get_method("wings").stage) if wings else Stage
    return made.model_validate({"name": "s", "workflow": "mm", **values})


@pytest.fixture
def iaa() -> GraftedModel:
    return grafted("iaa", layers=[1, 2], untie=False)


def test_every_trained_parameter_is_in_one_group_at_its_rate(iaa):
    lr = {"projector": 1e-3, "head": 3e-6, "default": 2e-5}
    groups = {g.name: g for g in open_stage(iaa, stage(train=["projector", "graft"], lr=lr))}
    assert {name: g.lr for name, g in groups.items()} == {
        "projector": 1e-3,
        "head": 3e-6,
        "graft": 2e-5,
    }
    names = [name for g in groups.values() for name in g.parameters]
    trained = [n for n, p in iaa.named_parameters() if p.requires_grad]
    assert sorted(names) == sorted(trained)
    assert all(n.startswith("workflows.mm.graft.head") for n in groups["head"].parameters)


def test_the_smallest_named_group_gives_the_rate(iaa):
    lr = {"graft": 1e-5, "norm": 1e-4, "layers": 2e-5, "projector": 1.0}
    groups = open_stage(iaa, stage(train=["graft", "projector"], lr=lr))
    rates = {name: g.lr for g in groups for name in g.parameters}
    assert rates["workflows.mm.graft.norm.weight"] == 1e-4
    assert rates["workflows.mm.graft.embedding.weight"] == 1e-5
    assert rates["workflows.mm.graft.layers.0.self_attn.q_proj.weight"] == 2e-5


def test_only_named_groups_train_and_the_rest_is_frozen(iaa):
    open_stage(iaa, stage(train=["graft"], lr=1e-4))
    open_stage(iaa, stage(train=["projector"], lr=1e-3, graft_active=False))
    trained = [n for n, p in iaa.named_parameters() if p.requires_grad]
    assert trained
    assert all(".projector." in name for name in trained)
    assert iaa.workflow().graft.active is False
    open_stage(iaa, stage(train=["layers"], lr=1e-4))
    assert iaa.workflow().graft.active is True


def test_trained_parameters_are_fp32_and_the_frozen_base_keeps_its_dtype():
    settings = get_method("iaa").config_class.model_validate({"layers": [1]})
    model = GraftedModel.graft(tiny_model("llama", dtype=torch.bfloat16), tiny_tower(), settings)
    open_stage(model, stage(train=["layers"], lr=1e-4))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert {p.dtype for p in model.base.parameters()} == {torch.bfloat16}


def test_learners_means_both_and_the_path_follows_the_stage():
    model = grafted("wings", rank=4)
    first = stage(
        train=["projector", "learners.visual"], learners=["visual"], router=False, lr=1e-3
    )
    names = [name for g in open_stage(model, first) for name in g.parameters]
    assert not [name for name in names if ".textual." in name or ".router." in name]
    assert model.workflow().graft.state()["learners"] == ["visual"]
    second = stage(train=["learners", "router"], router=True, lr={"learners": 1e-3, "router": 1e-2})
    groups = {g.name: g for g in open_stage(model, second)}
    assert {name: g.lr for name, g in groups.items()} == {"learners": 1e-3, "router": 1e-2}
    assert any(".textual." in name for name in groups["learners"].parameters)
    assert model.workflow().graft.state()["learners"] == ["visual", "textual"]


def test_a_router_out_of_the_path_takes_one_learner():
    model = grafted("wings", rank=4)
    with pytest.raises(UsageError, match=r"learners: \[visual\]"):
        open_stage(model, stage(train=["learners"], router=False, lr=1e-3))
    one = grafted("wings", rank=4, learners=["visual"])
    with pytest.raises(UsageError, match="nothing to weigh"):
        open_stage(one, stage(train=["learners.visual"], router=True, lr=1e-3))


def test_a_group_that_the_graft_does_not_have_is_refused():
    model = grafted("iaa", layers=[1], head=False)
    with pytest.raises(UsageError, match="head"):
        open_stage(model, stage(train=["head"], lr=1e-4))


def test_a_tied_head_and_embedding_are_one_parameter():
    settings = get_method("iaa").config_class.model_validate({"layers": [1]})
    model = GraftedModel.graft(tiny_model("qwen2"), tiny_tower(), settings)
    lr = {"embedding": 1e-4, "head": 1e-4, "default": 1e-5}
    groups = open_stage(model, stage(train=["graft"], lr=lr))
    parameters = [id(p) for g in groups for p in g.parameters.values()]
    assert len(parameters) == len(set(parameters))
    graft = model.workflow().graft
    assert graft.head.weight is graft.embedding.weight
