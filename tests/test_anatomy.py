"""The anatomy of every architecture, held against what the real model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from mmgraft.anatomy import (
    Anatomy,
    decoder_layers,
    examine,
    examine_config,
    get_path,
    skeleton,
)
from mmgraft.anatomy.inspection import position_table
from mmgraft.anatomy.stand_ins import BranchUnknown, examine_branch
from mmgraft.errors import UsageError
from tiny import ARCHITECTURES, LAYERS, VARIANTS, WINDOW, tiny_config, tiny_model

EVERY = [*ARCHITECTURES, *VARIANTS]
PARALLEL = {"phi", "phi_qk_norm", "gpt_neox", "falcon", "falcon_new", "falcon_alibi", "stablelm"}
PARALLEL |= {"cohere", "cohere_qk_norm"}


def ids() -> torch.Tensor:
    return torch.randint(6, 300, (2, 12), generator=torch.Generator().manual_seed(5))


def during(model: nn.Module, hooks: dict[nn.Module, Callable[..., Any]], run: Callable) -> Any:
    """Runs with forward hooks that are taken away again."""
    handles = [m.register_forward_hook(h, with_kwargs=True) for m, h in hooks.items()]
    try:
        with torch.no_grad():
            return run()
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_the_zoo_has_every_promised_architecture() -> None:
    assert len(ARCHITECTURES) == 23
    types = {arch.model_type for arch in ARCHITECTURES.values()}
    promised = "llama qwen2 qwen3 qwen3_moe mistral mixtral gemma2 gemma3_text phi phi3 gpt2 "
    promised += "gpt_neox opt bloom falcon olmo2 stablelm cohere granite smollm3 glm starcoder2"
    assert types == {*promised.split(), "gpt_oss"}


@pytest.mark.parametrize("name", EVERY)
def test_a_skeleton_tells_the_same_as_the_model_and_neither_is_changed(name: str) -> None:
    config = tiny_config(name)
    before = config.to_dict()
    model = tiny_model(name)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        logits = model(ids()).logits
    anatomy = examine(model)
    assert anatomy == examine_config(config)
    assert config.to_dict() == before
    assert all(p.device.type == "meta" for p in skeleton(config).parameters())
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, logits)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert anatomy.blocked == {}
    assert (anatomy.branch_blocked, anatomy.logits_blocked) == (None, None)


@pytest.mark.parametrize("name", EVERY)
def test_sizes_and_layer_types_are_those_of_the_models_own_cache(name: str) -> None:
    model = tiny_model(name)
    anatomy = examine(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(), past_key_values=cache, use_cache=True)
    sliding = [kind != "full_attention" for kind in anatomy.layer_types]
    assert len(cache.layers) == len(sliding) == anatomy.num_layers == LAYERS
    for layer, slides in zip(cache.layers, sliding, strict=True):
        assert layer.is_sliding == slides
        # Falcon's cache repeats its one key head for every query head.
        heads = {anatomy.num_kv_heads, anatomy.num_heads if "falcon" in name else 0}
        assert layer.keys.shape[1] in heads
        assert layer.keys.shape[-1] == anatomy.head_dim
    assert anatomy.sliding_window == (WINDOW if any(sliding) else None)
    rows, width = model.get_input_embeddings().weight.shape
    assert (anatomy.vocab_size, anatomy.embedding_size) == (rows, width)


@pytest.mark.parametrize("name", EVERY)
def test_norm_head_scale_and_cap_make_the_logits(name: str) -> None:
    model = tiny_model(name)
    anatomy = examine(model)
    seen: dict[str, torch.Tensor] = {}

    def keep(part: str) -> Callable[..., None]:
        return lambda module, args, kwargs, out: seen.__setitem__(part, first(out))

    norm = get_path(model, anatomy.norm_path) if anatomy.norm_path else None
    head = get_path(model, anatomy.head_path)
    last = decoder_layers(model, anatomy)[-1]
    hooks = {last: keep("layer"), head: keep("head"), **({norm: keep("norm")} if norm else {})}
    logits = during(model, hooks, lambda: model(ids()).logits)
    with torch.no_grad():
        if norm is None:
            assert name == "opt_post_norm"  # its layers end with a norm, and a projection follows
        else:
            assert torch.equal(norm(seen["layer"]), seen["norm"])
            assert torch.equal(head(seen["norm"]), seen["head"])
    made = seen["head"] * anatomy.logit_scale
    if anatomy.logit_softcap:
        made = anatomy.logit_softcap * torch.tanh(made / anatomy.logit_softcap)
    assert torch.allclose(made, logits, atol=1e-6)
    assert anatomy.tied == (head.weight is model.get_input_embeddings().weight)


def layer_call(model: PreTrainedModel, anatomy: Anatomy, index: int) -> tuple[nn.Module, Any]:
    """A decoder layer and the arguments that the model calls it with."""
    layer = decoder_layers(model, anatomy)[index]
    calls: list[Any] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        calls.append((args, kwargs))

    during(model, {layer: keep}, lambda: model(ids(), use_cache=False))
    return layer, calls[0]


@pytest.mark.parametrize("name", [n for n in EVERY if n != "bloom"])
def test_the_attention_joins_the_stream_where_and_as_the_probe_says(name: str) -> None:
    """Adding d to the stream must equal adding d / scale at the found place, in every layer.

    Bloom is left out: its attention adds the stream by itself, so both are one.
    """
    model = tiny_model(name)
    anatomy = examine(model)
    layer, (args, kwargs) = layer_call(model, anatomy, 1)
    joint = layer.get_submodule(anatomy.attention_name)
    if anatomy.branch_norm:
        joint = layer.get_submodule(anatomy.branch_norm)
    outputs: list[Any] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        outputs.append(out)

    plain = first(during(model, {joint: keep}, lambda: layer(*args, **kwargs)))
    delta = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))

    def moved(by: torch.Tensor | float) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            fixed = first(outputs[0]) + by
            return (fixed, *out[1:]) if isinstance(out, tuple) else fixed

        return hook

    scaled = delta / anatomy.residual_scale
    at_branch = first(during(model, {joint: moved(scaled)}, lambda: layer(*args, **kwargs)))
    if anatomy.parallel_block:
        assert torch.allclose(at_branch - plain, delta, atol=1e-5)
    else:
        state = args[0] + delta
        in_stream = during(model, {joint: moved(0.0)}, lambda: layer(state, *args[1:], **kwargs))
        assert torch.allclose(at_branch, first(in_stream), atol=1e-5)
        assert not torch.allclose(at_branch - plain, delta, atol=1e-3)
    assert anatomy.parallel_block == (name in PARALLEL)


def test_exceptions_by_architecture() -> None:
    found = {name: examine_config(tiny_config(name)) for name in EVERY}

    def having(value: Callable[[Anatomy], Any]) -> dict[str, Any]:
        return {name: value(a) for name, a in found.items() if value(a)}

    router = having(lambda a: a.explicit_weights)
    assert {name.partition("_")[0] for name in router} == {"gemma2", "bloom", "falcon", "gpt"}
    assert "gpt_neox" not in router
    assert "sinks" in router["gpt_oss"]
    assert "soft-cap" in router["gemma2"]
    assert "registry" in router["bloom"]
    assert [n for n, a in found.items() if not a.attention_in_registry] == [
        n for n in EVERY if n.startswith(("bloom", "falcon"))
    ]
    assert having(lambda a: a.branch_norm) == dict.fromkeys(
        ["gemma2", "gemma3", "olmo2"], "post_attention_layernorm"
    )
    assert having(lambda a: a.residual_scale != 1 and a.residual_scale) == {"granite": 0.6}
    scales = having(lambda a: a.logit_scale != 1 and a.logit_scale)
    assert scales == {"cohere": 0.4, "cohere_qk_norm": 0.4, "granite": pytest.approx(1 / 1.5)}
    assert having(lambda a: a.logit_softcap) == {"gemma2": 3.0}
    no_rope = {name for name, a in found.items() if a.rope_theta is None}
    assert no_rope == {"gpt2", "opt", "opt_post_norm", "bloom", "falcon_alibi"}
    assert found["llama"].rope_theta == 500.0
    assert found["gemma3"].rope_theta == 10000.0  # of the full layers, not the sliding ones' 100
    assert {name for name, a in found.items() if a.max_positions != 128} == {"bloom"}
    assert found["bloom"].max_positions is None
    assert (found["falcon"].num_kv_heads, found["falcon_new"].num_kv_heads) == (1, 2)
    assert found["gemma3"].layer_types[1] == "full_attention"


def test_soft_capping_that_is_switched_off_needs_no_explicit_weights() -> None:
    anatomy = examine_config(tiny_config("gemma2", attn_logit_softcapping=None))
    # What is left is that the class offers no fused attention at all.
    assert anatomy.explicit_weights == "Gemma2ForCausalLM has no fused attention"


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}

# model type -> values beside SMALL, layers that cannot carry a graft, a word of the reason
HYBRID: dict[str, tuple[dict[str, Any], list[int], str]] = {
    "qwen3_next": ({}, [0, 1, 2], "GatedDeltaNet"),
    "jamba": ({"attn_layer_offset": 1, "attn_layer_period": 2}, [0, 2], "Mamba"),
    "bamba": (
        {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
        [0, 2, 3],
        "linear",
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, [0, 2], "ShortConv"),
    "granitemoehybrid": (
        {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4},
        [0, 2],
        "Mamba",
    ),
    "minimax": ({}, [1, 3], "Lightning"),
    "falcon_h1": ({"mamba_d_ssm": 32, "mamba_n_heads": 4}, [0, 1, 2, 3], "hybrid"),
    "zamba2": ({"layers_block_type": ["mamba", "hybrid"] * 2}, [0, 1, 2, 3], "Mamba"),
    "recurrent_gemma": ({}, [0, 1, 2, 3], "Recurrent"),
    "mamba": ({}, [0, 1, 2, 3], "Mamba"),
    "rwkv": ({}, [0, 1, 2, 3], "Rwkv"),
    "gemma3n_text": (
        {
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2,
            "num_kv_shared_layers": 1,
        },
        [1, 2, 3],
        "shares keys and values",
    ),
    "openai-gpt": ({}, [0, 1, 2, 3], "cache"),
}


@pytest.mark.parametrize("model_type", HYBRID)
def test_layers_that_cannot_carry_a_graft_are_named_with_the_reason(model_type: str) -> None:
    values, blocked, word = HYBRID[model_type]
    anatomy = examine_config(CONFIG_MAPPING[model_type](**{**SMALL, **values}))
    assert sorted(anatomy.blocked) == blocked
    assert all(word in reason for reason in anatomy.blocked.values())
    if len(blocked) == anatomy.num_layers:
        assert anatomy.branch_blocked == "no layer can carry a graft"


@pytest.mark.parametrize(
    ("model_type", "names"),
    [("llama", {"layer_idx"}), ("gpt_neo", {"layer_id"}), ("minicpm3", {"layer_idx"})],
)
def test_attributes_that_number_a_layer_are_found(model_type: str, names: set[str]) -> None:
    values = TABLES.get(model_type, SMALL)
    assert examine_config(CONFIG_MAPPING[model_type](**values)).layer_numbers == names


def test_attention_scaled_by_the_layers_number_is_blocked() -> None:
    anatomy = examine_config(tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True))
    assert sorted(anatomy.blocked) == list(range(LAYERS))
    assert "scale_attn_by_inverse_layer_idx" in anatomy.blocked[0]


@pytest.mark.parametrize(
    ("model_type", "word"),
    [
        ("bert", "encoder"),
        ("t5", "encoder"),
        ("whisper", "encoder"),
        ("clip", "other than text"),
        ("gemma3", "other than text"),
        ("clip_vision_model", "not a causal language model"),
    ],
)
def test_what_is_no_text_decoder_is_refused(model_type: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        examine_config(CONFIG_MAPPING[model_type]())
    assert "give a text model" in str(caught.value)


# Numbers that a class computes from its configuration, and that no table of ours holds.
def test_unknown_factors_are_measured() -> None:
    mini = CONFIG_MAPPING["minicpm3"](**SMALL, scale_depth=1.4, dim_model_base=8)
    anatomy = examine_config(mini)
    assert anatomy.residual_scale == pytest.approx(1.4 / 2)
    assert anatomy.logit_scale == pytest.approx(8 / 32)
    nano = examine_config(CONFIG_MAPPING["nanochat"](**SMALL, final_logit_softcapping=7.0))
    assert (nano.logit_scale, nano.logit_softcap) == (1.0, 7.0)
    glm4 = examine_config(CONFIG_MAPPING["glm4"](**SMALL, head_dim=8, pad_token_id=2))
    assert glm4.branch_norm == "post_self_attn_layernorm"


class Attention(nn.Module):
    pass


class Norm(nn.Module):
    pass


class Gate(nn.Module):
    pass


class Layer(nn.Module):
    """A decoder layer of which a test writes the `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm, self.after, self.mlp = Attention(), Norm(), Norm(), nn.Linear(6, 6)
        self.gate = Gate()
        self.learned = nn.Parameter(torch.ones(6))


class Sandwich(Layer):
    def forward(self, x: torch.Tensor, mask: Any) -> tuple[torch.Tensor, None]:
        x = x + 0.25 * self.after(self.attn(self.norm(x), mask)[0])
        return x + self.mlp(self.norm(x)), None


class Passed(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attn(self.norm(x), x)
        return self.mlp(self.norm(x), x)


class Learned(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.learned * self.attn(x)


class Gated(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gate(self.attn(x))


class Damped(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x + self.attn(x)


class Squared(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attn(x) ** 2


class Broken(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attn.weight


def test_the_branch_of_a_layer_never_seen_before() -> None:
    branch = examine_branch(Sandwich(), "attn")
    assert (branch.scale, branch.norm, branch.parallel) == (0.25, "after", False)
    branch = examine_branch(Passed(), "attn")
    assert (branch.scale, branch.norm, branch.parallel) == (1.0, None, False)


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (Learned, "one number"),
        (Gated, "joins the residual stream"),
        (Damped, "residual stream itself"),
        (Squared, "one number"),
        (Broken, "could not be followed"),
    ],
)
def test_a_branch_that_cannot_be_added_to_is_refused(layer: type[Layer], word: str) -> None:
    with pytest.raises(BranchUnknown, match=word):
        examine_branch(layer(), "attn")


TABLES = {
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "gpt_neo": {
        **{"hidden_size": 16, "num_layers": 2, "num_heads": 2},
        "attention_types": [[["global", "local"], 1]],
    },
    "biogpt": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "ctrl": {"n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 16},
    "xglm": {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 16},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16},
}
"""Ways to keep positions that none of the zoo has: in attentions, in buffers, made anew."""


def config_for_16(name: str) -> Any:
    if name not in TABLES:
        config = tiny_config(name)
        config.max_position_embeddings = 16
        return config
    more = {} if name == "mpt" else {"max_position_embeddings": 16}
    return CONFIG_MAPPING[name](
        vocab_size=60, bos_token_id=1, eos_token_id=2, **TABLES[name], **more
    )


@pytest.mark.parametrize("name", [*EVERY, *TABLES])
def test_a_table_of_positions_is_found_where_a_longer_row_fails(name: str) -> None:
    model = AutoModelForCausalLM.from_config(config_for_16(name)).eval()

    def takes(length: int) -> bool:
        try:
            with torch.no_grad():
                model(input_ids=torch.full((1, length), 7), use_cache=False)
        except (IndexError, RuntimeError):
            return False
        return True

    assert takes(16)
    assert position_table(model, model.config) == (None if takes(17) else 16)
    assert position_table(skeleton(model.config), model.config) == (None if takes(17) else 16)
