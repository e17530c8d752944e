"""Examine a causal LM: finds its parts by their roles and reads its sizes.

Linear layers inside a decoder layer are found fused, turned (GPT-2's) and packed alike.
"""

import copy
import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from mmgraft.anatomy import stand_ins
from mmgraft.anatomy.blocked import blocked_layer, explicit_weights_reason, in_registry
from mmgraft.anatomy.description import Anatomy
from mmgraft.errors import UsageError

_CALLED = re.compile(r"self\.(\w+)\(")


def leaf_linears(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Find the linear layers that are given each position of a row by itself, in its place.

    Of a part that holds experts only the shared ones are found: the others are stacked tensors, or
    are called with the tokens of all rows sorted by expert, and a router is no part of the
    network's width. Left out too is what makes keys and values of what a cache holds: it is given
    all positions so far.

    Args:
        layer: A decoder layer, on any device, quantised or not.

    Returns:
        The widths of what goes in and comes out, by dotted name.
    """
    routed: set[nn.Module] = set()
    for part in filter(_holds_experts, layer.children()):
        shared = [
            m for name, one in part.named_children() if "shared" in name for m in _network(one)
        ]
        routed |= {*part.modules()} - {*shared}
    modules = {name: part for name, part in layer.named_modules() if part not in routed}
    for name, part in list(modules.items()):
        for member in _of_cached(type(part)):
            modules.pop(f"{name}.{member}", None)
    sizes = {name: _sizes(part) for name, part in modules.items()}
    return {name: size for name, size in sizes.items() if size is not None}


@cache
def _of_cached(attention: type[nn.Module]) -> frozenset[str]:
    """Return what an attention calls between reading its cache and attending, by helpers too."""
    try:
        source = inspect.getsource(attention.forward).partition(".update(")[2]
        between, attends, _ = source.partition("attention_interface(")
        called = _CALLED.findall(between) if attends else []
        helpers = [getattr(attention, name, None) for name in called]
        inner = [inspect.getsource(one) for one in helpers if inspect.isfunction(one)]
    except (OSError, TypeError):  # a class made at run time
        return frozenset()
    return frozenset([*called, *_CALLED.findall("".join(inner))])


def _network(part: nn.Module) -> list[nn.Module]:
    """Return the modules of a network of several linear layers; none of a gate, which has one."""
    modules = list(part.modules())
    return modules if len([m for m in modules if _sizes(m)]) > 1 else []


def _holds_experts(part: nn.Module) -> bool:
    stacked = any(parameter.dim() > 2 for parameter in part.parameters())
    lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
    return stacked or any(_sizes(one) is not None for each in lists for one in each.modules())


def _sizes(part: nn.Module) -> tuple[int, int] | None:
    if isinstance(part, Conv1D):
        return part.nx, part.nf
    sizes = getattr(part, "in_features", None), getattr(part, "out_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


_TEXT_ONLY = "give a text model that predicts the next token, such as Llama or Qwen2"


def skeleton(
    config: PreTrainedConfig, kind: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """Build the base's class on the meta device: every module, no memory, no weights.

    Args:
        config: The base's configuration; it is not changed.
        kind: The base's class; by default the one that transformers makes of the configuration.

    Raises:
        UsageError: Transformers has no causal LM for this configuration.
    """
    refuse_non_causal(text_config(config))
    try:
        with torch.device("meta"), no_init_weights():
            made = copy.deepcopy(config)
            model: PreTrainedModel = (
                kind._from_config(made)
                if kind is not None
                else AutoModelForCausalLM.from_config(made, trust_remote_code=False)
            ).eval()
    except Exception as error:  # whatever a foreign __init__ may raise over its configuration
        raise UsageError(
            f"{config.model_type!r} is not a causal language model that transformers can build "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); {_TEXT_ONLY}"
        ) from error
    model.tie_weights()
    return model


def examine_config(config: PreTrainedConfig) -> Anatomy:
    """Examine the base that a configuration describes, without weights. See ``examine``."""
    return examine(skeleton(config))


def examine(model: PreTrainedModel) -> Anatomy:
    """Examine a causal LM, on any device, quantised or not; it is not changed.

    Raises:
        UsageError: The model is no decoder-only causal LM, or its parts cannot be found.
    """
    refuse_non_causal(model.config)
    config = model.config.get_text_config(decoder=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head_path, embedding_path = _path_of(model, head), _path_of(model, embedding)
    if head_path is None or embedding_path is None or not isinstance(embedding, nn.Embedding):
        raise UsageError(f"{type(model).__name__} has no language model head; {_TEXT_ONLY}")
    layers_path, layers = _find_layers(model, config)
    attentions = [_find_attention(layer) for layer in layers]
    layer_types, cached = _layer_types(config, len(layers)), _cache_layers(config, len(layers))
    reasons = [
        blocked_layer(layer, i, layer_types[i], cached[i], attentions[i], config)
        for i, layer in enumerate(layers)
    ]
    blocked = {i: reason for i, reason in enumerate(reasons) if reason}
    carriers = [i for i in range(len(layers)) if i not in blocked]
    first = carriers[0] if carriers else 0
    attention_name = attentions[first] or ""
    attention = layers[first].get_submodule(attention_name)
    return Anatomy(
        model_type=config.model_type,
        class_name=type(model).__name__,
        layers_path=layers_path,
        attention_name=attention_name,
        embedding_path=embedding_path,
        norm_path=_find_norm(model, layers_path),
        head_path=head_path,
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        embedding_size=embedding.weight.shape[1],
        vocab_size=embedding.weight.shape[0],
        max_positions=getattr(config, "max_position_embeddings", None),
        position_table=position_table(model, config),
        layer_types=layer_types,
        sliding_window=_window(config) if set(layer_types) != {"full_attention"} else None,
        rope_theta=_rope_theta(config),
        tied=getattr(head, "weight", None) is embedding.weight,
        explicit_weights=explicit_weights_reason(model, attention),
        **_inside(layers, model.get_submodule(layers_path.rpartition(".")[0])),
        blocked=blocked,
        **_branch([layers[i] for i in carriers], attention_name),
        **_logits(model, head_path, layers_path),
        **_heads(attention, config),
    )


def _logits(model: PreTrainedModel, head_path: str, layers_path: str) -> dict[str, Any]:
    try:
        scale, cap = stand_ins.examine_logits(model, head_path, layers_path.rpartition(".")[0])
    except stand_ins.LogitsUnknown as error:
        return {"logits_blocked": str(error)}
    return {"logit_scale": scale, "logit_softcap": cap}


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration that transformers makes a causal LM from: of a model with other
    inputs too, that of its text, where there is a class for it alone.
    """
    of_text: Any = getattr(config, "sub_configs", {}).get("text_config")
    if (
        of_text not in MODEL_FOR_CAUSAL_LM_MAPPING
        or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        return config
    made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return config.get_text_config() if made.config_class is of_text else config


def refuse_non_causal(config: PreTrainedConfig) -> None:
    """Raise UsageError for a configuration that cannot be that of a text-only decoder."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{kind!r} is an encoder with a decoder; {_TEXT_ONLY}")
    parts = set(getattr(config, "sub_configs", {}))
    beside_text = "text_config" in parts and parts - {"text_config"}
    if beside_text or any(hasattr(config, f"{sense}_config") for sense in ("vision", "audio")):
        raise UsageError(f"{kind!r} has inputs other than text already; {_TEXT_ONLY}")


def _path_of(model: nn.Module, part: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is part), None)


def _find_layers(model: nn.Module, config: PreTrainedConfig) -> tuple[str, nn.ModuleList]:
    """Find the outermost list that has as many entries as the model has layers."""
    of_decoder = getattr(config, "decoder_layers", None)  # Blenderbot's other number is BART's
    count = of_decoder or getattr(config, "num_hidden_layers", None)
    for path, module in _outer_first(model):
        if isinstance(module, nn.ModuleList) and len(module) == count:
            if getattr(config, "is_decoder", None) is False and "encoder" in path.split("."):
                raise UsageError(
                    f"{type(model).__name__} is an encoder (is_decoder is false in its "
                    f"configuration); {_TEXT_ONLY}"
                )
            return path, module
    raise UsageError(
        f"{type(model).__name__} has no list of its {count} decoder layers; {_TEXT_ONLY}"
    )


def _outer_first(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from sorted(module.named_modules(), key=lambda item: item[0].count("."))


def _find_attention(layer: nn.Module) -> str | None:
    """Find the outermost part of a layer that is an attention by class name or projections."""
    for path, module in _outer_first(layer):
        if path and not stand_ins.is_norm(module) and "cross" not in path and _is_attention(module):
            return path
    return None


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    named = "attention" in name or name.endswith(("attn", "sdpa"))
    projections = {"q_proj", "k_proj", "v_proj"}
    return (named and "norm" not in name) or projections <= module._modules.keys()


def _find_norm(model: nn.Module, layers_path: str) -> str | None:
    """Find the norm beside the list of layers that is called last, after the layers."""
    trunk_path, _, layers_name = layers_path.rpartition(".")
    trunk = model.get_submodule(trunk_path)
    source = inspect.getsource(type(trunk).forward)
    called = {
        name: source.rfind(f"self.{name}(")
        for name, child in trunk.named_children()
        if stand_ins.is_norm(child)
    }
    last = max(called, key=lambda name: called[name], default=None)
    if last is None or called[last] < source.find(f"self.{layers_name}"):
        return None
    return f"{trunk_path}.{last}"


def _branch(layers: list[nn.Module], attention: str) -> dict[str, Any]:
    """Probe all layers; a graft on the branch needs them to be alike."""
    if not layers:
        return {"branch_blocked": "no layer can carry a graft"}
    try:
        found = [stand_ins.examine_branch(layer, attention) for layer in layers]
    except stand_ins.BranchUnknown as error:
        return {"branch_blocked": str(error)}
    differs = "its layers add their attention to the residual stream in different ways"
    return {
        "parallel_block": found[0].parallel,
        "residual_scale": found[0].scale,
        "branch_norm": found[0].norm,
        "branch_blocked": differs if len(set(found)) > 1 else None,
    }


def _layer_types(config: PreTrainedConfig, count: int) -> tuple[str, ...]:
    """Return the type of every layer as transformers' caches derive it.

    The decoder of an encoder and a decoder may have more layers than ``num_hidden_layers`` says.
    """
    types = getattr(config, "layer_types", None)
    if types is not None:
        return tuple(types)
    kind = "full_attention"
    if getattr(config, "sliding_window", None) is not None:
        kind = "sliding_attention"
    elif getattr(config, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    return (kind,) * count


def _cache_layers(config: PreTrainedConfig, count: int) -> Sequence[Any]:
    """Return what transformers' cache has for each layer; None where it has nothing."""
    try:
        layers = DynamicCache(config=config).layers
    except Exception:  # a class without a cache of this kind may lack what it is made from
        layers = []
    return [*layers, *[None] * count]


def _inside(layers: nn.ModuleList, trunk: nn.Module) -> dict[str, Any]:
    return {
        "linears": {index: leaf_linears(layer) for index, layer in enumerate(layers)},
        "layer_numbers": _layer_numbers(layers),
        "takes_positions": "position_ids" in inspect.signature(type(trunk).forward).parameters,
    }


def _layer_numbers(layers: nn.ModuleList) -> frozenset[str]:
    """Return the attributes that hold, wherever they stand in a layer, the layer's number."""
    found: dict[str, list[tuple[int, int]]] = {}
    for number, layer in enumerate(layers):
        for module in layer.modules():
            for name, value in vars(module).items():
                if isinstance(value, int) and not isinstance(value, bool):
                    found.setdefault(name, []).append((number, value))
    equal = {name: set(pairs) for name, pairs in found.items() if all(n == v for n, v in pairs)}
    # In one layer alone, a number may be that of anything else.
    return frozenset(name for name, at in equal.items() if len(at) > 1 or "layer" in name)


def _window(config: PreTrainedConfig) -> int | None:
    window = getattr(config, "sliding_window", None)
    return getattr(config, "attention_chunk_size", None) if window is None else window


def _heads(attention: nn.Module, config: PreTrainedConfig) -> dict[str, Any]:
    heads: int = getattr(config, "num_attention_heads", None) or 1

    def size(*names: str, default: int) -> int:
        for owner in (attention, config):
            for name in names:
                value: Any = getattr(owner, name, None)
                if isinstance(value, int) and value > 0:
                    return value
        return default

    return {
        "attention_in_registry": in_registry(attention),
        "num_heads": heads,
        "num_kv_heads": size("num_kv_heads", "num_key_value_heads", default=heads),
        "head_dim": size("head_dim", "head_size", default=config.hidden_size // heads),
    }


def _rope_theta(config: PreTrainedConfig) -> float | None:
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or getattr(config, "alibi", False):
        return None
    if "rope_theta" not in parameters:  # one dictionary a layer type
        by_type = [v for v in parameters.values() if isinstance(v, dict)]
        parameters = parameters.get("full_attention") or next(iter(by_type), {})
    theta = parameters.get("rope_theta")
    return None if theta is None else float(theta)


def position_table(model: PreTrainedModel, config: PreTrainedConfig) -> int | None:
    """Return the length of a base's table of positions; None where it computes them, as rotary.

    A table is an embedding beside that of tokens, or a tensor that is no weight, whose size is the
    longest sequence that the configuration states.

    Args:
        model: The base, on any device.
        config: Of its text.
    """
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int):
        # MPT makes its ALiBi for so many positions and no more.
        most = getattr(config, "max_seq_len", None)
        return most if isinstance(most, int) else None
    return stated if stated in set(_table_sizes(model)) else None


def _table_sizes(model: PreTrainedModel) -> Iterator[int]:
    """Yield sizes of all that might be a table of positions."""
    tokens = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            if module is not tokens:  # OPT's first two entries are no positions
                yield module.num_embeddings - int(getattr(module, "offset", 0))
            continue
        held = {**module._buffers, **vars(module)}  # GPT-J's and CTRL's tables are no parameters
        for tensor in held.values():
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                yield from tensor.shape[:1] if tensor.dim() == 2 else ()
