"""A base's config for more layers describes the same layers, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import CONFIG_MAPPING

from mmgraft.anatomy import examine, get_path, shrunken, skeleton
from mmgraft.errors import UsageError
from mmgraft.export.llava.config import stretch
from tiny import ARCHITECTURES, VARIANTS, tiny_config

SOURCES = [0, 0, 1, 2, 2, 3, 3]


def layers(config: Any) -> nn.ModuleList:
    model = skeleton(config)
    found = get_path(model, examine(model).layers_path)
    assert isinstance(found, nn.ModuleList)
    return found


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *VARIANTS])
def test_every_layer_is_built_as_the_one_it_comes_from(arch: str) -> None:
    config = tiny_config(arch)
    before = config.to_dict()
    old, new = layers(config), layers(stretch(config, SOURCES))
    assert config.to_dict() == before
    assert len(new) == len(SOURCES)
    for layer, source in zip(new, SOURCES, strict=True):
        shapes = {name: p.shape for name, p in layer.named_parameters()}
        assert shapes == {name: p.shape for name, p in old[source].named_parameters()}
        assert [type(m) for m in layer.modules()] == [type(m) for m in old[source].modules()]


OTHERS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "attention"]},
}
"""Layers numbered by another name, and a config that has no number of layers."""


@pytest.mark.parametrize("kind", OTHERS)
def test_layers_numbered_and_counted_otherwise(kind: str) -> None:
    config = shrunken(CONFIG_MAPPING[kind](**OTHERS[kind]))
    old, new = layers(config), layers(stretch(config, SOURCES))
    assert len(new) == len(SOURCES)
    for layer, source in zip(new, SOURCES, strict=True):
        assert [type(m) for m in layer.modules()] == [type(m) for m in old[source].modules()]


@pytest.mark.parametrize(
    ("arch", "field", "expected"),
    [
        ("smollm3", "no_rope_layers", [1, 1, 0, 1, 1, 0, 0]),
        ("qwen3_moe_mixed", "mlp_only_layers", [0, 1, 3, 4]),
        (
            "gemma3",
            "layer_types",
            ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 4,
        ),
    ],
)
def test_lists_by_layer_and_of_layers(arch: str, field: str, expected: list[Any]) -> None:
    assert getattr(stretch(tiny_config(arch), SOURCES), field) == expected


def test_sliding_windows_stay_on_their_layers() -> None:
    """Qwen2 counts them from `max_window_layers` only where `layer_types` is not given."""
    config = tiny_config("qwen2_sliding")
    windows = [layer.self_attn.sliding_window for layer in layers(config)]
    assert windows == [None, None, 8, 8]
    stretched = [layer.self_attn.sliding_window for layer in layers(stretch(config, SOURCES))]
    assert stretched == [windows[source] for source in SOURCES]


def test_lists_that_only_look_as_long_are_left_alone() -> None:
    config = tiny_config("llama", eos_token_id=[1, 2, 3, 4])
    config.architectures = ["a", "b", "c", "d"]
    stretched = stretch(config, SOURCES)
    assert stretched.eos_token_id == [1, 2, 3, 4]
    assert stretched.architectures == ["a", "b", "c", "d"]


def test_what_is_derived_from_a_layers_number_is_refused() -> None:
    config = tiny_config("qwen3_moe", decoder_sparse_step=2)
    with pytest.raises(
        UsageError, match=r"layer 1 would have mlp.class = Qwen3MoeS.*layer 0 .*MLP"
    ) as error:
        stretch(config, SOURCES)
    assert "--to full" in str(error.value)
    assert stretch(config, range(4)).to_dict() == config.to_dict()


def test_attention_scaled_by_a_layers_number_is_refused() -> None:
    config = tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UsageError, match="gpt2 base with 7 layers cannot be described"):
        stretch(config, SOURCES)
