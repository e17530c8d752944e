"""Invariant 2: a graft that starts at zero changes nothing on image rows against the LLaVA path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grafting import (
    BESIDE,
    CONFIGS,
    batch,
    distance,
    every_architecture,
    fresh,
    graft_on,
    grafted,
    logits_of,
    plain,
    project,
    rows,
)
from mmgraft import GraftedModel, IAAConfig
from mmgraft.grafts.registry import get_method

WORDS = ("ttiiiitttttttt", "iiiittiiiittt", "tttttttttiiii")
NEAR = 1e-5
"""Bound of rounding, where a fresh graft does the same by another product."""
CLAIMED = {name: not get_method(one.method).promises(one).fresh for name, one in CONFIGS.items()}
IN_THE_SEQUENCE = [name for name in CONFIGS if name not in {"llava", *BESIDE}]
"""Methods whose images stand in the sequence; tests/grafts/xattn compares those beside it."""


def inputs() -> dict[str, Tensor]:
    return batch(rows(*WORDS), "left")


def llava(arch: str, projector: torch.nn.Module) -> GraftedModel:
    """The LLaVA path on a base of its own, with the same projector."""
    model = graft_on(arch, CONFIGS["llava"])
    model.workflow().projector.load_state_dict(projector.state_dict())
    return model


@every_architecture
def test_the_llava_path_is_the_base_on_merged_embeddings(arch: str) -> None:
    model, base, given = fresh(arch, "llava"), plain(arch), inputs()
    embeds = base.get_input_embeddings()(given["input_ids"]).detach().clone()
    projected = project(model, given["image_features"]).detach()
    embeds[given["mm_token_type_ids"] == 1] = projected.flatten(0, 1)
    mask = given["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # Bloom's and OPT's own forwards count positions from the mask.
    extra = {} if arch == "bloom" else {"position_ids": positions}
    expected = logits_of(base, {"inputs_embeds": embeds, "attention_mask": mask, **extra})
    assert torch.equal(logits_of(model, given), expected)


def test_the_methods_that_begin_silent() -> None:
    silent = {name for name, claimed in CLAIMED.items() if claimed}
    assert silent == {"iaa-a", "iaa-b", "wings", "lora", "lora-token", "xattn"}


@every_architecture
def test_a_fresh_graft_is_silent(arch: str) -> None:
    """Level E3, bit for bit; what does not claim it speaks from the start, or rounds."""
    given = inputs()
    for method in IN_THE_SEQUENCE:
        model = fresh(arch, method)
        expected = logits_of(llava(arch, model.workflow().projector), given)
        found = logits_of(model, given)
        if method == "expert":
            assert distance(found, expected) < NEAR
        else:
            assert torch.equal(found, expected) == CLAIMED[method], method


@pytest.mark.parametrize("structure", ["a", "b"])
def test_a_scalar_gate_is_silent_too_and_opens(structure: str) -> None:
    config = IAAConfig(layers=[0, 2], structure=structure, gate="scalar")
    model = graft_on("llama", config)
    expected = logits_of(llava("llama", model.workflow().projector), inputs())
    assert torch.equal(logits_of(model, inputs()), expected)
    with torch.no_grad():
        for gate in model.workflow().graft.gates:
            gate.scale.fill_(0.5)
    assert distance(logits_of(model, inputs()), expected) > 1e-2


@pytest.mark.parametrize("method", IN_THE_SEQUENCE)
def test_the_projector_stage_is_the_llava_path(method: str) -> None:
    """With the graft out of the path, whatever its weights, the projector alone acts."""
    model = grafted("llama", method)
    expected = logits_of(llava("llama", model.workflow().projector), inputs())
    graft = model.workflow().graft
    graft.set_state({"active": False})
    try:
        found = logits_of(model, inputs())
    finally:
        graft.set_state({"active": True})
    assert torch.equal(found, expected)
    assert distance(logits_of(model, inputs()), expected) > 1e-2


@every_architecture
def test_grafts_that_were_trained_speak(arch: str) -> None:
    """Check what the other tests rely on: every method of the matrix changes image rows visibly."""
    for method in IN_THE_SEQUENCE:
        model = grafted(arch, method)
        silent = logits_of(llava(arch, model.workflow().projector), inputs())
        assert distance(logits_of(model, inputs()), silent) > 1e-2, method
