"""Names in published checkpoints, sorted into grafts, base and tower."""

from typing import Any

import pytest

from mmgraft.errors import UsageError
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.published.names import PUBLISHED_LAYERS, Published, read_published
from mmgraft.published.wings.config import OfficialWingsConfig

Shapes = dict[str, tuple[int, ...]]
H, R = 8, 2


def base_shapes(layers: int = 2, bias: bool = False) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (16, H), "model.norm.weight": (H,)}
    shapes["lm_head.weight"] = (16, H)
    for i in range(layers):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (H, H)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (12, H)
        shapes[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = (2,)
        if bias:
            shapes[f"model.layers.{i}.self_attn.q_proj.bias"] = (H,)
    return shapes


def projector(name: str = "model.mm_projector") -> Shapes:
    return {f"{name}.{i}.{kind}": (H,) for i in (0, 2) for kind in ("weight", "bias")}


def iaa_shapes(inserted: int = 2, layers: int = 2, grounding: bool = False) -> Shapes:
    shapes = base_shapes(layers)
    for tail, own in (("", projector()), ("_grounding", projector("model.mm_projector_G"))):
        if tail and not grounding:
            continue
        shapes |= own
        shapes[f"model.embed_tokens_condition{tail}.weight"] = (16, H)
        shapes[f"model.norm_condition{tail}.weight"] = (H,)
        shapes[f"lm_head_condtion{tail}.weight"] = (16, H)
        for k in range(inserted):
            shapes[f"model.condition_layers{tail}.{k}.mlp.up_proj.weight"] = (12, H)
    shapes["model.vision_tower.vision_tower.vision_model.post_layernorm.bias"] = (4,)
    return shapes


def wings_shapes(routed: bool = True, bias: bool = True) -> Shapes:
    shapes = base_shapes(2, bias) | projector()
    for i in range(2):
        for learner in ("attn_pool", "attn_t_pool"):
            for part in "qkvo":
                name = f"model.layers.{i}.{learner}.{part}_proj"
                shapes |= {f"{name}.0.weight": (R, H), f"{name}.1.weight": (H, R)}
        if routed:
            shapes[f"model.layers.{i}.reweight_module.linear.weight"] = (2, 32)
            shapes[f"model.layers.{i}.reweight_module.linear.bias"] = (2,)
    return shapes


def config(**more: Any) -> dict[str, Any]:
    known = {"num_hidden_layers": 2, "hidden_size": H, "vocab_size": 16, "rope_theta": 5e5}
    return {**known, "mm_vision_tower": "openai/tower", "mm_vision_select_layer": -3, **more}


def wings(**more: Any) -> dict[str, Any]:
    return config(**{"system_prompt_length": 5, "image_token_length": 9, **more})


def every_name(published: Published) -> list[str]:
    """All published names that were given a place."""
    names = [*published.base_tensors, *published.tower_tensors.values(), *published.left_out]
    for graft in published.grafts:
        names += graft.tensors.values()
    return sorted(names)


def test_iaa_with_two_workflows() -> None:
    shapes = iaa_shapes(grounding=True)
    published = read_published(shapes, config(ehce_layers=[0, 1]))
    assert [graft.workflow for graft in published.grafts] == ["mm", "grounding"]
    mm, grounding = published.grafts
    assert mm.config == IAAConfig(layers=[0, 1])
    assert mm.tensors["graft.layers.1.mlp.up_proj.weight"].startswith("model.condition_layers.1")
    assert mm.tensors["graft.head.weight"] == "lm_head_condtion.weight"
    assert mm.tensors["projector.mlp.2.bias"] == "model.mm_projector.2.bias"
    assert grounding.tensors["projector.mlp.2.bias"] == "model.mm_projector_G.2.bias"
    assert grounding.tensors["graft.embedding.weight"].endswith("condition_grounding.weight")
    assert not set(mm.tensors.values()) & set(grounding.tensors.values())
    assert (published.base_class, published.tower_id) == ("LlamaForCausalLM", "openai/tower")
    assert published.feature_layer == -3
    assert list(published.tower_tensors) == ["vision_model.post_layernorm.bias"]
    buffers = [name for name in shapes if "inv_freq" in name]
    assert every_name(published) == sorted(set(shapes) - set(buffers))


def test_iaa_layers_come_from_the_config_the_option_or_the_published_list() -> None:
    places = PUBLISHED_LAYERS[14]
    long = config(num_hidden_layers=32)
    published = read_published(iaa_shapes(14, 32), long)
    assert published.grafts[0].config == IAAConfig(layers=places)
    chosen = read_published(iaa_shapes(8, 32), long, layers="every:4").grafts[0].config
    assert chosen == IAAConfig(layers=[3, 7, 11, 15, 19, 23, 27, 31])
    with pytest.raises(UsageError, match="--layers"):
        read_published(iaa_shapes(8, 32), long)
    with pytest.raises(UsageError, match="2 inserted layers, but --layers names 1"):
        read_published(iaa_shapes(2), config(), layers="1")
    with pytest.raises(UsageError, match="ascend"):
        read_published(iaa_shapes(2), config(ehce_layers=[1, 0]))


def test_a_tied_base_gets_two_copies() -> None:
    tied = config(ehce_layers=[0, 1], tie_word_embeddings=True)
    assert read_published(iaa_shapes(), tied).grafts[0].config == IAAConfig(
        layers=[0, 1], untie=True
    )


def test_wings_stage_two() -> None:
    shapes = wings_shapes()
    published = read_published(shapes, wings(attention_bias=True, sliding_window=4))
    (graft,) = published.grafts
    assert graft.config == OfficialWingsConfig(
        layers=[0, 1],
        rank=R,
        router_width=32,
        system_prompt_length=5,
        image_token_length=9,
    )
    assert (
        graft.tensors["graft.layers.1.textual.key.up.weight"]
        == "model.layers.1.attn_t_pool.k_proj.1.weight"
    )
    assert graft.tensors["graft.layers.0.router.bias"].endswith("reweight_module.linear.bias")
    assert published.base_class == "Qwen2ForCausalLM"
    assert "attention_bias" not in published.base_config  # Qwen2's biases are not a setting
    assert published.base_config["sliding_window"] == 4
    assert published.left_out == []
    assert every_name(published) == sorted(name for name in shapes if "inv_freq" not in name)


def test_wings_stage_one_leaves_the_textual_learner_out() -> None:
    published = read_published(wings_shapes(routed=False, bias=False), wings(sliding_window=4))
    settings = published.grafts[0].config
    assert isinstance(settings, OfficialWingsConfig)
    assert (settings.learners, settings.router) == (["visual"], False)
    assert len(published.left_out) == 16
    assert not any("textual" in name for name in published.grafts[0].tensors)
    assert published.base_class == "LlamaForCausalLM"
    assert "sliding_window" not in published.base_config


def without(shapes: Shapes, part: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if part not in name}


def test_what_is_no_published_checkpoint_is_refused() -> None:
    with pytest.raises(UsageError, match="no published IAA or Wings"):
        read_published(base_shapes(), config())
    with pytest.raises(UsageError, match="no lm_head_condtion"):
        read_published(without(iaa_shapes(), "lm_head_condtion"), config(ehce_layers=[0, 1]))
    with pytest.raises(UsageError, match="two linear layers"):
        read_published(without(wings_shapes(), "mm_projector.2.bias"), wings())
    with pytest.raises(UsageError, match="mlp2x_gelu"):
        read_published(wings_shapes(), wings(mm_projector_type="linear"))
    other_router = wings_shapes() | {"model.layers.0.reweight_module.mlp.0.weight": (2, 2)}
    with pytest.raises(UsageError, match="linear router"):
        read_published(other_router, wings())
    with pytest.raises(UsageError, match="system_prompt_length"):
        read_published(wings_shapes(), config(image_token_length=9))
    with pytest.raises(UsageError, match="leave --layers out"):
        read_published(wings_shapes(), wings(), layers="all")
