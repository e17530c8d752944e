"""The two files: a decoder, and vision tower with projector, as llama.cpp names what is in them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmgraft.basefiles.tensor_files import LazyTensor
from mmgraft.errors import UsageError
from mmgraft.export.folder import NOTE_KEY
from mmgraft.export.llava.fit import Ingredients
from mmgraft.export.llava.processor import image_processor
from mmgraft.frozen import Frozen
from mmgraft.progress import counted
from mmgraft.version import __version__

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
#: Rotary embeddings that divide each frequency by a number of its own, once for all.
_SCALED = ("linear", "llama3")

_ACTIVATIONS = ("gelu_pytorch_tanh", "quick_gelu")
_CLIP = (
    "llama.cpp puts the class token of CLIP at the wrong end, so that every patch is read with "
    "its neighbour's position (issue 25814 of ggml-org/llama.cpp)"
)
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
#: Numbers in a row that share a scale in Q8_0.
_BLOCK = 32

_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 1 + 2 / _BLOCK}


class GgufFile(Frozen):
    """One file to write.

    Attributes:
        architecture: Llama.cpp's name for it.
        describe: Adds the metadata.
        tensors: By llama.cpp's names, in the order in which they are read.
        outtype: Type of the matrices: ``f32``, ``f16`` or ``q8_0``.
    """

    architecture: str
    describe: "Callable[[GGUFWriter], None]"
    tensors: dict[str, LazyTensor]
    outtype: str

    def stored(self, tensor: LazyTensor) -> tuple[str, int]:
        """Return the type of a tensor in the file, and its bytes."""
        kind = self.outtype if len(tensor.shape) > 1 else "f32"
        if kind == "q8_0" and [1, *tensor.shape][-1] % _BLOCK:
            kind = "f16"
        return kind, int(tensor.numel * _BYTES[kind])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(self.stored(tensor)[1] for tensor in self.tensors.values())

    def write(self, path: Path) -> None:
        """Write the file; one piece of the model at a time is in memory.

        Raises:
            UsageError: A number is too large for the type.
        """
        from gguf import GGMLQuantizationType, GGUFWriter, quants

        writer = GGUFWriter(path, self.architecture)
        writer.add_string(f"{NOTE_KEY}.version", __version__)
        writer.add_file_type(_FILE_TYPES[self.outtype])
        writer.add_quantization_version(2)
        self.describe(writer)
        single = numpy.dtype(numpy.float32)
        for name, tensor in self.tensors.items():
            kind, size = self.stored(tensor)
            stored = GGMLQuantizationType[kind.upper()]
            writer.add_tensor_info(name, tensor.shape, single, size, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in counted(f"writing {path.name}, tensors", self.tensors.items()):
            kind, values = self.stored(tensor)[0], tensor.read().float().contiguous()
            if kind != "f32" and not values.abs().max() <= torch.finfo(torch.half).max:
                raise UsageError(f"{name} holds numbers too large for {kind}; give --outtype f32.")
            stored = GGMLQuantizationType[kind.upper()]
            writer.write_tensor_data(quants.quantize(values.numpy(), stored))
        writer.close()


def refuse(what: str, reasons: dict[str, bool]) -> None:
    """Raise a UsageError with the first reason that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(
                f"{what} is not written for llama.cpp: {reason}. Use --to llava or --to full."
            )


def check_parts(made_of: Ingredients) -> str:
    """Return llama.cpp's name of the decoder's architecture.

    Raises:
        UsageError: Llama.cpp would run decoder or tower otherwise than transformers, or was not
            compared with it.
    """
    name, config, tower = made_of.anatomy.class_name, made_of.base_config, made_of.tower
    refuse(name, {f"only {', '.join(_ARCHITECTURES)} are": name not in _ARCHITECTURES})
    architecture = _ARCHITECTURES[name]
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    sliding = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    allowed = ("default", *_SCALED) if architecture == "llama" else ("default",)
    refuse(
        name,
        {
            "some of its layers see a window alone": bool(sliding),
            f"its activation is {config.hidden_act}": config.hidden_act != "silu",
            f"its rotary embedding is scaled ({kind})": kind not in allowed,
            "it rotates a part of each head": rope.get("partial_rotary_factor", 1.0) != 1.0,
        },
    )
    vision, (height, width) = tower.model.config, tower.image_size
    subject, own = f"the vision tower {tower.spec.name}", vision.model_type
    other = f"it is {own}, not SigLIP"
    refuse(subject, {_CLIP: own == "clip_vision_model", other: own != "siglip_vision_model"})
    refuse(
        subject,
        {
            f"its activation is {vision.hidden_act}": vision.hidden_act not in _ACTIVATIONS,
            f"it takes {height} x {width} pixels, no square": height != width,
            "its image processor changes a square of its size": not _plain_pixels(made_of),
        },
    )
    return architecture


def _plain_pixels(made_of: Ingredients) -> bool:
    """Return whether pixels are ``(byte / 255 - mean) / std``, as in llama.cpp."""
    height, width = made_of.tower.image_size
    noise = torch.arange(height * width * 3).reshape(height, width, 3) * 37 % 256
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    processor = image_processor(made_of)
    if not processor.do_normalize:
        return False
    given = processor(image, return_tensors="pt")["pixel_values"][0]
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    wanted = (noise.permute(2, 0, 1) / 255 - mean) / std
    return given.shape == wanted.shape and bool((given - wanted).abs().max() < 1e-4)


def decoder_file(
    made_of: Ingredients,
    architecture: str,
    tensors: dict[str, LazyTensor],
    outtype: str,
    tokens: "Callable[[GGUFWriter], None]",
) -> GgufFile:
    """Return the decoder's file.

    Args:
        made_of: The parts.
        architecture: Llama.cpp's name of it.
        tensors: Of the stock LLaVA model.
        outtype: Type of the matrices.
        tokens: Adds tokenizer and chat template.
    """
    config = made_of.base_config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def describe(writer: "GGUFWriter") -> None:
        writer.add_name(made_of.record.workflow)
        writer.add_block_count(len(made_of.layers))
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(size)
        writer.add_value_length(size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        tokens(writer)

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    own: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("language_model."):
            count = heads.get(name.split(".")[-2]) if architecture == "llama" else None
            read = partial(_interleaved, tensor, count) if count else tensor.read
            own[name.removeprefix("language_model.")] = replace(tensor, read=read)
    named = _named(architecture, len(made_of.layers), own)
    rope = config.rope_parameters
    if rope.get("rope_type", "default") in _SCALED:
        scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        factors = plain / scaled
        named["rope_freqs.weight"] = LazyTensor((size // 2,), torch.float32, lambda: factors)
    return GgufFile(architecture, describe, named, outtype)


def _interleaved(tensor: LazyTensor, heads: int) -> Tensor:
    """Put the two numbers that rotate together side by side: ``(heads * size, ...)``."""
    values = tensor.read()
    pairs = values.reshape(heads, 2, -1, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def vision_file(made_of: Ingredients, tensors: dict[str, LazyTensor], outtype: str) -> GgufFile:
    """Return the file of tower and projector: all but what comes after the tower's last layer."""
    tower = made_of.tower
    config, pixels = tower.model.config, image_processor(made_of)

    def describe(writer: "GGUFWriter") -> None:
        writer.add_type("mmproj")
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type("mlp")
        writer.add_vision_projection_dim(made_of.anatomy.hidden_size)
        writer.add_vision_image_size(tower.image_size[0])
        writer.add_vision_patch_size(config.patch_size)
        writer.add_vision_embedding_length(config.hidden_size)
        writer.add_vision_feed_forward_length(config.intermediate_size)
        writer.add_vision_block_count(config.num_hidden_layers)
        writer.add_array("clip.vision.feature_layer", [tower.feature_map.index])
        writer.add_vision_head_count(config.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
        writer.add_vision_image_mean(list(pixels.image_mean))
        writer.add_vision_image_std(list(pixels.image_std))
        writer.add_vision_use_gelu(config.hidden_act != "quick_gelu")

    after = ("vision_model.head.", "vision_model.post_layernorm.")
    own = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("language_model.") and not any(part in name for part in after)
    }
    named = _named("clip", config.num_hidden_layers, own)
    named = {name.replace("mm.1.", "mm.0."): tensor for name, tensor in named.items()}
    return GgufFile("clip", describe, named, "f16" if outtype == "q8_0" else outtype)


def _named(architecture: str, layers: int, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return tensors by llama.cpp's names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, layers)
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        new = names.get_name(name, (".weight", ".bias"))
        refuse(name, {f"its {architecture} has no place for it": new is None})
        found[str(new)] = tensor
    return found
