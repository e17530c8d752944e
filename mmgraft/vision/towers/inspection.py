"""The place of a vision model's patch features, found by running it once on the meta device."""

import inspect
from dataclasses import field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from mmgraft.errors import UsageError, first_line
from mmgraft.frozen import Frozen

NAFLEX_TYPES = ("siglip2", "siglip2_vision_model")


class FeatureMap(Frozen):
    """Rule to read patch features out of one model's outputs at one image size.

    Attributes:
        layer: The feature layer, as a spec names it.
        index: The same as an index from 0 into the hidden states; None is the model's last output.
        is_grid: The features come as (n, C, H, W), not as tokens (n, S, C).
        prefix: Tokens before the patches (class, distillation, registers), to be dropped.
        grid: Rows and columns of patches.
        hidden_size: Width of a feature vector.
        arguments: What the model's forward must be given beside the pixels.
        selects: Whether the model, asked for one hidden state by its index, gives that one.
    """

    layer: int
    index: int | None
    is_grid: bool
    prefix: int
    grid: tuple[int, int]
    hidden_size: int
    arguments: dict[str, Any] = field(default_factory=dict)
    selects: bool = False

    def features(self, model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        """Run the model and read its patches, row by row: (n, 3, H, W) -> (n, P, hidden)."""
        # Keep one hidden state in memory where the model can, all of them elsewhere.
        wanted = self.index is not None and ([self.index] if self.selects else True)
        outputs = model(pixel_values=pixel_values, output_hidden_states=wanted, **self.arguments)
        hidden = (
            outputs.last_hidden_state if self.index is None else outputs.hidden_states[self.index]
        )
        if self.is_grid:  # (n, C, H, W) -> (n, H * W, C)
            return hidden.flatten(2).transpose(1, 2).contiguous()
        return hidden[:, self.prefix :]


def vision_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Return the vision part of a config: its own ``vision_config`` where it has one, else itself.

    Raises:
        UsageError: A SigLIP 2 NaFlex checkpoint, whose images have no fixed number of patches.
    """
    if config.model_type in NAFLEX_TYPES:
        raise UsageError(
            f"{name} is a SigLIP 2 NaFlex checkpoint, whose number of patches differs from image "
            "to image; such towers are not read yet. Use a fixed-resolution SigLIP 2 instead, "
            "such as google/siglip2-so400m-patch14-384 or google/siglip2-base-patch16-256."
        )
    part = getattr(config, "vision_config", None)
    return part if isinstance(part, PreTrainedConfig) else config


def skeleton(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """Return the vision model on the meta device: no memory, no weights.

    Raises:
        UsageError: Transformers has no image model for this config.
    """
    try:
        with torch.device("meta"):
            model = _made(config)
    except Exception as error:  # whatever a foreign __init__ may raise over its configuration
        raise _refusal(name, config, first_line(error)) from error
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        raise _refusal(name, config, "it takes no images")
    return model.eval()


def is_part(config: PreTrainedConfig) -> bool:
    """Tell whether AutoModel has no class for the vision part of a model alone, as of BLIP-2's."""
    return type(config) not in MODEL_MAPPING


def _made(config: PreTrainedConfig) -> PreTrainedModel:
    if is_part(config):
        module = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        for kind in vars(module).values():
            if getattr(kind, "config_class", None) is type(config):
                return kind(config)
    return AutoModel.from_config(config, trust_remote_code=False)


def examine(
    model: PreTrainedModel, image_size: tuple[int, int], layer: int | None, name: str
) -> FeatureMap:
    """Find the patch features of a model at one image size.

    Args:
        model: The model, usually a ``skeleton``.
        image_size: (height, width) of its pixels.
        layer: Index into the hidden states; -1 of a convolutional model is its last output. None
            means -2, or -1 where hidden states differ in their number of tokens.
        name: The tower's name, for messages.

    Raises:
        UsageError: The model does not run on pixels of that size alone, has no such layer, or gives
            tokens whose number does not fit its patches.
    """
    arguments = _size_arguments(model, image_size)
    pixels = torch.zeros(1, 3, *image_size, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            outputs = model(pixel_values=pixels, output_hidden_states=True, **arguments)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        reason = f"it does not run on {image_size[0]} x {image_size[1]} pixels ({first})"
        raise _refusal(name, model.config, reason) from error
    last = getattr(outputs, "last_hidden_state", None)
    states: tuple[Tensor, ...] = getattr(outputs, "hidden_states", None) or ()
    if not states and last is None:
        raise _refusal(name, model.config, "it returns no hidden states")

    staged = len({state.shape[1:] for state in states}) != 1
    layer = layer if layer is not None else (-1 if staged else -2)
    if layer == -1 and last is not None and (last.dim() == 4 or not states):
        index, hidden = None, last
    elif -len(states) <= layer < len(states):
        index = layer % len(states)
        hidden = states[index]
    else:
        raise UsageError(
            f"feature_layer {layer} is out of range: {name} has {len(states)} hidden states; "
            f"choose one of {-len(states)} .. {len(states) - 1}."
        )
    selects = index is not None and _selects(model, pixels, index, len(states), arguments)
    if hidden.dim() == 4:  # (1, C, H, W)
        _, width, *grid = hidden.shape
        return FeatureMap(layer, index, True, 0, (grid[0], grid[1]), width, arguments, selects)
    if hidden.dim() != 3:
        raise _refusal(name, model.config, f"layer {layer} has the shape {tuple(hidden.shape)}")
    prefix, patches = _split_tokens(model, hidden.shape[1], image_size, staged, name)
    return FeatureMap(layer, index, False, prefix, patches, hidden.shape[2], arguments, selects)


def _selects(
    model: PreTrainedModel, pixels: Tensor, index: int, count: int, arguments: dict[str, Any]
) -> bool:
    """Return whether a list of indices counts hidden states as the full output does.

    From transformers 5.19 to 5.22 such a list holds the numbers of layers, one lower than those of
    the hidden states: the output is then one shorter.
    """
    with torch.no_grad():
        outputs = model(pixel_values=pixels, output_hidden_states=[index], **arguments)
    states = outputs.hidden_states
    return states is not None and len(states) == count and states[index] is not None


def _size_arguments(model: PreTrainedModel, image_size: tuple[int, int]) -> dict[str, Any]:
    """Ask for interpolated position embeddings where the pixels are not the trained size."""
    trained = _pair(getattr(model.config, "image_size", None))
    takes_it = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    if takes_it and trained is not None and trained != image_size:
        return {"interpolate_pos_encoding": True}
    return {}


def _split_tokens(
    model: PreTrainedModel, tokens: int, image_size: tuple[int, int], staged: bool, name: str
) -> tuple[int, tuple[int, int]]:
    """Prefix tokens and the grid of patches, from the number of tokens.

    Raises:
        UsageError: The number is neither the grid alone nor the grid after the special tokens that
            the config can account for.
    """
    config = model.config
    registers = getattr(config, "num_register_tokens", None) or 0
    classes = getattr(config, "n_cls_tokens", None) or 1
    # None; a class token (or several); a distillation token too; then the registers.
    prefixes = {0, classes, classes + registers, *([2] if registers == 0 else [])}
    grids: list[tuple[int, int]] = []
    patch = _pair(getattr(config, "patch_size", None))
    if patch is not None:
        grids.append((image_size[0] // patch[0], image_size[1] // patch[1]))
    if staged:
        height, width = image_size
        while height > 1 and width > 1:
            height, width = -(-height // 2), -(-width // 2)
            grids.append((height, width))
    for grid in grids:
        if tokens - grid[0] * grid[1] in prefixes:
            return tokens - grid[0] * grid[1], grid
    shown = f"{grids[0][0]} x {grids[0][1]} patches" if grids else "no known patch size"
    raise _refusal(
        name,
        config,
        f"it gives {tokens} tokens for {shown}, which special tokens before the patches "
        "do not explain",
    )


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2:
        return int(value[0]), int(value[1])
    return None


def _refusal(name: str, config: PreTrainedConfig, reason: object) -> UsageError:
    return UsageError(
        f"{name} (model type {config.model_type}) cannot serve as a vision tower: {reason}. Use an "
        "image encoder such as SigLIP, CLIP, DINOv2, ViT or ConvNeXt, or register a tower of "
        "your own (mmgraft.vision.register_tower)."
    )
