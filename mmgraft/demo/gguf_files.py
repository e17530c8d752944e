"""A GGUF file as an ordinary transformers folder: config, safetensors, tokenizer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmgraft.basefiles.whole import quiet
from mmgraft.errors import UsageError


def write_folder(gguf: Path, folder: Path) -> None:
    """Dequantise a causal LM and write it with its tokenizer and chat template.

    transformers holds what it reads from GGUF to be quantised and would not save it, so the
    weights move, as bfloat16, into a plain model of the same class.

    Args:
        gguf: The file.
        folder: An existing folder that is filled.

    Raises:
        UsageError: Gguf is not installed, or the file cannot be read.
    """
    if find_spec("gguf") is None:
        raise UsageError(f"{gguf.name} needs gguf to be read; run:\n  pip install 'mmgraft[gguf]'")

    source: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    try:
        with _quietly():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
            read: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, dtype=torch.float32, **source
            )
    # The reader raises nearly anything on broken bytes: struct.error, IndexError ...
    except Exception as error:
        raise UsageError(
            f"{gguf} cannot be read ({type(error).__name__}: {error}); install its package again"
        ) from error
    settings = json.loads(read.config.to_json_string(use_diff=False))
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    config = type(read.config).from_dict(settings)
    with torch.device("meta"):
        plain = type(read)(config)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in read.state_dict().items()}
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.config.dtype = torch.bfloat16
    plain.generation_config = read.generation_config
    with _quietly():
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the bars of transformers and of its GGUF reader off the console."""
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    tqdm = getattr(reader, "tqdm", None)
    reader.tqdm = lambda items, *_, **__: items
    try:
        with quiet():
            yield
    finally:
        reader.tqdm = tqdm
