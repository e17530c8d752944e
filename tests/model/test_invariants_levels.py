"""Levels E1 and E2 of unchanged text, bit for bit, for all methods that claim them and no other.

E0 is in test_invariants_text, E3 in test_invariants_fresh.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grafting import (
    CONFIGS,
    MIXTURES,
    batch,
    every_pair,
    grafted,
    plain,
    rows,
)
from mmgraft.grafts.registry import built_in, get_method

WORDS = ("ttttttiiiittt", "ttttttttttt", "ttiiiittiiiitttttt", "tttttttttttttttttt")
TEXT, SEEING, BEFORE = (1, 3), (0, 2), (6, 2)


def levels(method: str) -> set[str]:
    """The levels that a method of the matrix claims."""
    config = CONFIGS[method]
    found = get_method(config.method).promises(config).levels
    return {level for level, reason in found.items() if not reason}


def test_each_method_claims_what_it_is_granted() -> None:
    granted = {
        "iaa-a": "E0 E1 E3",
        "iaa-b": "E0 E1 E3",
        "iaa-c": "E0 E1",
        "wings": "E0 E1 E3",
        "llava": "E0 E1 E2",
        "lora": "E0 E1 E3",
        "lora-token": "E0 E1 E2 E3",
        "expert": "E0 E1 E2",
        "xattn": "E0 E1 E2 E3",
    }
    assert {name: " ".join(sorted(levels(name))) for name in CONFIGS} == granted
    by_method = {one.name: one.levels() for one in built_in()}
    assert by_method["iaa"] == {"E0": [], "E1": [], "E3": ["structure: a", "structure: b"]}
    assert by_method["lora"] == {"E0": [], "E1": [], "E2": ["gate: token"], "E3": []}
    assert by_method["expert"] == {"E0": [], "E1": [], "E2": []}
    assert by_method["wings-official"] == {}


def both(arch: str, method: str, side: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """Return logits of a graft and its base for one padded batch, with any ids at images.

    Positions are given, as no base counts them from the mask by itself but Bloom and OPT.
    """
    model, base, inputs = grafted(arch, method), plain(arch), batch(rows(*WORDS), side)
    mask = inputs["attention_mask"]
    text = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    if model._takes_positions:
        text["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"use_cache": True, "output_hidden_states": True}
    with torch.no_grad():
        return model(**inputs, **options), base(**text, **options), inputs


def same(one: Tensor, other: Tensor, arch: str) -> bool:
    """Equal to the bit; but experts compute all tokens in one product, which rounds by all."""
    return torch.allclose(one, other, atol=1e-5) if arch in MIXTURES else torch.equal(one, other)


def before_images(out: Any, arch_layers: int, inputs: dict[str, Tensor]) -> list[Tensor]:
    """States of all layers, keys and values of all layers, at text before a row's first image."""
    found = []
    for row, count in zip(SEEING, BEFORE, strict=True):
        first = int(inputs["attention_mask"][row].argmax())
        columns = slice(first, first + count)
        found += [state[row, columns] for state in out.hidden_states[:-1]]
        found.append(out.logits[row, columns])
        for layer in out.past_key_values.layers[:arch_layers]:
            gone = inputs["input_ids"].shape[1] - layer.keys.shape[2]  # out of a sliding window
            kept = slice(max(first - gone, 0), max(first + count - gone, 0))
            found += [layer.keys[row, :, kept], layer.values[row, :, kept]]
    return found


@every_pair
def test_text_beside_an_image_and_before_it(arch: str, method: str) -> None:
    for side in ("left", "right"):
        ours, theirs, inputs = both(arch, method, side)
        for row in TEXT:  # E1
            real = inputs["attention_mask"][row].bool()
            assert same(ours.logits[row, real], theirs.logits[row, real], arch), side
        for row in SEEING:  # and it is no text that the others read
            last = int(inputs["attention_mask"][row].nonzero()[-1])
            assert not torch.equal(ours.logits[row, last], theirs.logits[row, last])
        layers = len(theirs.past_key_values.layers)
        mine, base = (before_images(out, layers, inputs) for out in (ours, theirs))
        kept = all(same(one, other, arch) for one, other in zip(mine, base, strict=True))
        assert kept == ("E2" in levels(method)), side
