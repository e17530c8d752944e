"""A base spread over devices: the graft follows each layer to where accelerate runs it."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from grafting import CONFIGS, batch, every_method, graft_on, rows

SECOND = torch.device("meta")
"""Stands for a second card: a product of its tensors with another device's is an error too."""


@every_method
@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi"])
def test_rows_cross_from_one_device_to_the_next(arch: str, method: str) -> None:
    model = graft_on(arch, CONFIGS[method], attention="eager")
    base, graft = model.base, model.workflow().graft
    trunk = base.model
    norm = trunk.get_submodule(model.anatomy.norm_path.removeprefix("model."))
    head = base.lm_head
    if model.anatomy.tied:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for module in (*trunk.layers[2:], norm, head):
        module.to(SECOND)
        add_hook_to_module(module, AlignDevicesHook(execution_device=SECOND))
    for index, module in graft.layer_modules():
        if index >= 2:
            module.to(SECOND)
    for own in (graft.norm, graft.head):
        if own is not None:
            own.to(SECOND)
    inputs = batch(rows("ttiiiitt", "ttttt"))
    for use_cache in (False, True):
        logits = model(**inputs, use_cache=use_cache).logits
        assert logits.device == SECOND
        assert logits.shape[:2] == inputs["input_ids"].shape
