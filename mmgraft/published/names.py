"""Read the names in checkpoints that the published IAA and Wings code wrote.

Only names, shapes and the config are looked at here; no tensor is read. Sources: the checkpoints of
arXiv 2408.12902 (IAA) and arXiv 2406.03496 (Wings).

    published                                           graft
    model.mm_projector.{0,2}.*                          projector.mlp.{0,2}.*
    model.condition_layers.{k}.*                        graft.layers.{k}.*
    model.embed_tokens_condition, norm_condition, ...   graft.embedding, graft.norm, graft.head
    model.layers.{i}.attn_pool.q_proj.{0,1}             graft.layers.{i}.visual.query.{down,up}
    model.layers.{i}.attn_t_pool. ...                   graft.layers.{i}.textual. ...
    model.layers.{i}.reweight_module.linear             graft.layers.{i}.router
    model.vision_tower.vision_tower.*                   the tower's own names
    all others                                          the base's own names
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.layers import parse_layers
from mmgraft.published.wings.config import OfficialWingsConfig

#: By their number, the layers that the published IAA code names; its list of 8 is unknown.
PUBLISHED_LAYERS = {14: [0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31]}

_TOWER = "model.vision_tower.vision_tower."
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.position_ids$")
_WINGS = re.compile(r"^model\.layers\.(\d+)\.(attn_pool|attn_t_pool|reweight_module)\.(.+)$")
_PARTS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
_SIDES = {"0": "down", "1": "up"}
_BASE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
    *("max_position_embeddings", "initializer_range", "use_cache", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
    *("attention_bias", "attention_dropout", "mlp_bias"),
    *("use_sliding_window", "sliding_window", "max_window_layers"),
)


#: The endings of the published names of a workflow's projector, and of its other modules.
_IAA_WORKFLOWS = {"mm": ("", ""), "grounding": ("_G", "_grounding")}


class PublishedGraft(Frozen):
    """One graft within a checkpoint.

    Attributes:
        workflow: Its name, ``mm`` or ``grounding``.
        config: Its settings.
        tensors: Graft tensor name -> published name.
    """

    workflow: str
    config: IAAConfig | OfficialWingsConfig
    tensors: dict[str, str]


class Published(Frozen):
    """Contents of a checkpoint.

    Attributes:
        method: ``iaa`` or ``wings-official``.
        grafts: The grafts, the default workflow first.
        base_class: Transformers class of the base.
        base_config: Its config's fields.
        base_tensors: Names of the base's tensors, which are the published ones too.
        tower_tensors: The tower's tensor name -> published name; empty when it is not inside.
        tower_id: What the config calls the tower, or None.
        feature_layer: Which of the tower's hidden states gives the features.
        left_out: Published tensors that nothing uses.
    """

    method: str
    grafts: list[PublishedGraft]
    base_class: str
    base_config: dict[str, Any]
    base_tensors: list[str]
    tower_tensors: dict[str, str]
    tower_id: str | None
    feature_layer: int
    left_out: list[str] = field(default_factory=list)


def read_published(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], layers: str | None = None
) -> Published:
    """Sort a checkpoint's tensors into grafts, base and tower.

    Args:
        shapes: Published tensor name -> shape.
        config: The checkpoint's config.json.
        layers: Base layers that IAA's inserted layers follow, where the config does not say.

    Raises:
        UsageError: For a checkpoint of another kind, and for one that misses tensors or settings.
    """
    names = [name for name in shapes if not _BUFFERS.search(name)]
    projector = config.get("mm_projector_type", "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        raise UsageError(
            f"the checkpoint's projector is {projector!r}; mmgraft imports 'mlp2x_gelu', which all "
            "published IAA and Wings checkpoints have"
        )
    tower = {name.removeprefix(_TOWER): name for name in names if name.startswith(_TOWER)}
    if any(name.startswith("model.condition_layers.") for name in names):
        method, grafts = "iaa", _iaa_grafts(names, config, layers)
    elif any(_WINGS.match(name) for name in names):
        if layers is not None:
            raise UsageError("a Wings checkpoint names its layers itself; leave --layers out")
        method, grafts = "wings-official", [_wings_graft(names, shapes, config)]
    else:
        raise UsageError(
            "this is no published IAA or Wings checkpoint: it has neither condition_layers nor "
            "attn_pool tensors. A plain language model needs no import: give it to mmgraft graft."
        )
    taken = set(tower.values()).union(*(graft.tensors.values() for graft in grafts))
    rest = [name for name in names if name not in taken]
    base = [name for name in rest if not _is_grafted(name)]
    base_class, base_config = _base(base, config)
    return Published(
        method=method,
        grafts=grafts,
        base_class=base_class,
        base_config=base_config,
        base_tensors=base,
        tower_tensors=tower,
        tower_id=config.get("mm_vision_tower"),
        feature_layer=int(config.get("mm_vision_select_layer", -2)),
        left_out=[name for name in rest if _is_grafted(name)],
    )


def _is_grafted(name: str) -> bool:
    """Return whether a tensor is no plain base's."""
    marks = ("condition", "condtion", "mm_projector", "vision_tower", "image_newline")
    return any(mark in name for mark in marks) or _WINGS.match(name) is not None


def _projector(names: Iterable[str], prefix: str) -> dict[str, str]:
    found = {
        f"projector.mlp.{name.removeprefix(prefix)}": name
        for name in names
        if name.startswith(prefix)
    }
    wanted = {f"projector.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    if set(found) != wanted:
        raise UsageError(
            f"the checkpoint's projector {prefix}* is not two linear layers with biases "
            f"({len(found)} tensors); the download may be incomplete: fetch it again"
        )
    return found


def _iaa_grafts(
    names: list[str], config: Mapping[str, Any], layers: str | None
) -> list[PublishedGraft]:
    grafts = []
    for workflow, (short, ending) in _IAA_WORKFLOWS.items():
        prefix = f"model.condition_layers{ending}."
        inserted = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        if not inserted:
            continue
        tensors = _projector(names, f"model.mm_projector{short}.")
        tensors.update({f"graft.layers.{rest}": name for rest, name in inserted.items()})
        owns = {"embedding": "model.embed_tokens_condition", "norm": "model.norm_condition"}
        for part, module in {**owns, "head": "lm_head_condtion"}.items():
            name = f"{module}{ending}.weight"
            if name not in names:
                raise UsageError(
                    f"the checkpoint has {prefix}* but no {name}; "
                    "the download may be incomplete: fetch it again"
                )
            tensors[f"graft.{part}.weight"] = name
        count = len({rest.split(".")[0] for rest in inserted})
        settings = {
            "layers": _iaa_layers(count, config, layers),
            "untie": bool(config.get("tie_word_embeddings")),
        }
        settings = IAAConfig.parse(settings, "the checkpoint's settings")
        grafts.append(PublishedGraft(workflow, settings, tensors))
    return grafts


def _iaa_layers(count: int, config: Mapping[str, Any], layers: str | None) -> list[int]:
    total = int(config["num_hidden_layers"])
    if layers is not None:
        indices, source = parse_layers(layers, total), "--layers"
    elif config.get("ehce_layers") is not None:
        listed = list(config["ehce_layers"])
        indices, source = parse_layers(listed, total), "its config"
        if listed != indices:
            raise UsageError(f"the config's ehce_layers {listed} do not ascend; give --layers")
    elif count in PUBLISHED_LAYERS:
        indices, source = parse_layers(PUBLISHED_LAYERS[count], total), "the published list"
    else:
        raise UsageError(
            f"the checkpoint has {count} inserted layers and does not say which base layers they "
            f"follow, and no list of {count} was published; give them with --layers"
        )
    if len(indices) != count:
        raise UsageError(
            f"the checkpoint has {count} inserted layers, but {source} names {len(indices)} base "
            f"layers; give {count} with --layers"
        )
    return indices


def _wings_graft(
    names: list[str], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> PublishedGraft:
    tensors = _projector(names, "model.mm_projector.")
    routed = any(".reweight_module." in name for name in names)  # else stage 1
    indices: set[int] = set()
    rank, width = 0, 4096
    for name in names:
        match = _WINGS.match(name)
        if match is None:
            continue
        index, module, rest = int(match[1]), match[2], match[3]
        if module == "reweight_module":
            tensors[f"graft.layers.{index}.router.{_router_part(rest, name)}"] = name
            if rest == "linear.weight":
                width = shapes[name][1]
            continue
        if module == "attn_t_pool" and not routed:
            continue  # present and never run
        part, side, kind = rest.split(".")
        learner = "visual" if module == "attn_pool" else "textual"
        tensors[f"graft.layers.{index}.{learner}.{_PARTS[part]}.{_SIDES[side]}.{kind}"] = name
        indices.add(index)
        if side == "0":
            rank = shapes[name][0]
    missing = [key for key in ("system_prompt_length", "image_token_length") if key not in config]
    if missing:
        raise UsageError(
            f"the checkpoint's config.json lacks {' and '.join(missing)}; add what its training "
            "used (14 system tokens for Qwen, 17 for Llama; 729 image tokens for SigLIP so400m)"
        )
    settings = {
        "layers": sorted(indices),
        "rank": rank,
        "learners": ["visual", "textual"] if routed else ["visual"],
        "router": routed,
        "router_width": width,
        "system_prompt_length": config["system_prompt_length"],
        "image_token_length": config["image_token_length"],
    }
    settings = OfficialWingsConfig.parse(settings, "the checkpoint's settings")
    return PublishedGraft("mm", settings, tensors)


def _router_part(rest: str, name: str) -> str:
    if rest not in ("linear.weight", "linear.bias"):
        raise UsageError(
            f"the checkpoint's router has a tensor {name}; mmgraft imports the linear router, "
            "which all released Wings checkpoints have"
        )
    return rest.removeprefix("linear.")


def _base(names: list[str], config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the base's transformers class and config fields."""
    qwen = any(name.endswith(".self_attn.q_proj.bias") for name in names)
    fields = {key: config[key] for key in _BASE_FIELDS if key in config}
    if qwen:
        for key in ("attention_bias", "mlp_bias", "head_dim"):
            fields.pop(key, None)
        return "Qwen2ForCausalLM", fields
    for key in ("use_sliding_window", "sliding_window", "max_window_layers"):
        fields.pop(key, None)
    return "LlamaForCausalLM", fields
