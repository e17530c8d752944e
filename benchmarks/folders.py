"""Folders for the benchmarks: bases, towers, pictures and rows of real shapes, drawn at random.

A base is written shard by shard from its config, so that one larger than memory can be made.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SMOLLM2: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
}  # fmt: skip
"""SmolLM2-135M's shape."""

TWO_BILLION: dict[str, Any] = {
    **SMOLLM2, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
"""2.03 billion parameters in 30 layers."""

CLIP: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 384, "patch_size": 16,
}  # fmt: skip
"""A ViT-B/16 at 384 pixels: 576 patches."""

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>")
_BLOCK = 1 << 24
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_base(
    folder: Path, shape: dict[str, Any], dtype: torch.dtype, shard_bytes: int = 1 << 30
) -> Path:
    """A causal LM of random weights with a tokenizer, as the Hub has it; gives its folder."""
    from transformers import CONFIG_MAPPING

    from mmgraft.anatomy import skeleton

    folder.mkdir(parents=True)
    values = {key: value for key, value in shape.items() if key != "model_type"}
    config = CONFIG_MAPPING[shape["model_type"]](**values, dtype=dtype)
    config.architectures = [type(skeleton(config)).__name__]
    config.save_pretrained(folder)
    with torch.device("meta"):
        empty = skeleton(config)
    tied = set(getattr(empty, "all_tied_weights_keys", {}))
    wanted = {name: tensor for name, tensor in empty.state_dict().items() if name not in tied}
    _write_shards(folder, wanted, dtype, shard_bytes)
    write_tokenizer(folder, config.vocab_size)
    return folder


def _write_shards(
    folder: Path, wanted: dict[str, Tensor], dtype: torch.dtype, shard_bytes: int
) -> None:
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in wanted.items():
        if size and size + tensor.numel() * dtype.itemsize > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.numel() * dtype.itemsize
    draw = torch.Generator().manual_seed(0)
    block = (torch.randn(_BLOCK, generator=draw) * 0.02).to(dtype)
    index: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        file = "model.safetensors" if len(groups) == 1 else file
        tensors = {name: _random(wanted[name], block, draw, dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
    if len(groups) > 1:
        total = sum(tensor.numel() * dtype.itemsize for tensor in wanted.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)


def _random(like: Tensor, block: Tensor, draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Ones for a norm; else numbers from another place of one random block each time."""
    if like.ndim < 2:
        return torch.ones(like.shape, dtype=dtype)
    out = torch.empty(like.numel(), dtype=dtype)
    start = int(torch.randint(0, _BLOCK // 2, (1,), generator=draw))
    for at in range(0, len(out), _BLOCK // 2):
        part = out[at : at + _BLOCK // 2]
        part.copy_(block[start : start + len(part)])
    return out.view(like.shape)


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE of so many words (256 bytes, then pairs of them), with ChatML."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(first, second) for first in letters for second in letters]
    merges = merges[: max(0, size - len(letters) - len(_SPECIAL))]
    words = [*_SPECIAL, *letters, *(first + second for first, second in merges)]
    vocab = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in _SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=_SPECIAL[0], eos_token=_SPECIAL[2],
        pad_token=_SPECIAL[0],
    )  # fmt: skip
    tokenizer.chat_template = _CHATML
    tokenizer.save_pretrained(folder)


def write_tower(folder: Path, dtype: torch.dtype, **values: Any) -> Path:
    """A CLIP vision tower of random weights with its image processor."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**{**CLIP, **values}))
    size = model.config.image_size
    model.to(dtype).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
        "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 3,
        "do_convert_rgb": True, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_rows(
    folder: Path,
    count: int,
    side: int = 384,
    answer: int = 120,
    images: int | None = None,
    text_every: int = 0,
) -> Path:
    """`rows.jsonl` and `images/`: a picture, a question, an answer of about so many letters.

    Args:
        folder: Where to.
        count: Rows.
        side: Of the pictures, in pixels.
        answer: Letters of an answer, two a token with `write_tokenizer`.
        images: Different pictures; one for each row when not given.
        text_every: Every so manyth row has no picture; 0 for none.
    """
    import numpy
    from PIL import Image

    draw, noise = random.Random(0), numpy.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(images or count):
        pixels = noise.integers(0, 255, (side // 8, side // 8, 3), dtype="uint8")
        picture = Image.fromarray(pixels).resize((side, side))
        picture.save(folder / "images" / f"{number}.png", compress_level=1)
    lines = []
    for number in range(count):
        question: list[dict[str, str]] = [{"type": "text", "text": f"What is number {number}?"}]
        if not text_every or number % text_every:
            picture = f"{number % (images or count)}.png"
            question.insert(0, {"type": "image", "image": picture})
        text = "".join(draw.choice("abcdefghijklmnop") for _ in range(answer))
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": text},
        ]
        lines.append(json.dumps({"id": str(number), "messages": messages}))
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(lines) + "\n")
    return rows
