"""IAA's three structures inside a base, against the slow reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from grafting import batch, graft_on, perturb, rows
from mmgraft import IAAConfig
from reference.iaa import iaa_reference


@pytest.mark.parametrize("gate", ["linear", "scalar"])
@pytest.mark.parametrize("structure", ["a", "b", "c"])
def test_hidden_states_are_the_references(structure: str, gate: str) -> None:
    """Layers after the first, a middle and the last base layer; everything moved from its start."""
    config = IAAConfig.parse({"layers": [0, 2, 3], "structure": structure, "gate": gate}, "test")
    model = perturb(graft_on("llama", config))
    graft = model.workflow().graft
    inputs = batch(rows("ttiiiitttt"))
    arguments: dict[str, object] = {}
    trunk = model.base.model
    hooks = [
        trunk.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: arguments.update(x=args[0], **kwargs), with_kwargs=True
        ),
        trunk.norm.register_forward_pre_hook(lambda _, args: arguments.update(last=args[0])),
    ]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    x, last = arguments.pop("x"), arguments.pop("last")

    def phi(layer: nn.Module):
        def run(state: Tensor) -> Tensor:
            out = layer(state, **arguments)
            return out[0] if isinstance(out, tuple) else out

        return run

    gates = dict(zip(graft.places, graft.gates, strict=True)) if structure != "c" else {}
    with torch.no_grad():
        states = iaa_reference(
            [phi(layer) for layer in trunk.layers],
            dict(zip(graft.places, map(phi, graft.layers), strict=True)),
            gates,
            structure,
            x,
        )
        torch.testing.assert_close(last, states[-1])
        torch.testing.assert_close(logits, graft.head(graft.norm(states[-1])))
