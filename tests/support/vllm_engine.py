"""vLLM in this process, on tiny bases whose heads its CPU kernels take."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

import numpy as np
import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from mmgraft import GraftedModel
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import load_processor

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
"""Sizes of a tiny base: vLLM's CPU attention takes heads of 32 numbers and more."""

NEW = 8
"""Tokens of an answer."""

Messages = list[dict[str, Any]]


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    """Load a folder, and let go of it at the end."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 384,
        "max_num_seqs": 8,
        "block_size": 32,
        "distributed_executor_backend": "uni",
        "limit_mm_per_prompt": {"image": 2},
        "seed": 0,
    }
    llm = LLM(str(folder), **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def greedy(**options: Any) -> SamplingParams:
    """The likeliest token each time, with its log-probability."""
    values = {"max_tokens": NEW, "temperature": 0.0, "logprobs": 1, "ignore_eos": True, **options}
    return SamplingParams(**values)


def image(size: int, seed: int) -> Image.Image:
    """An image of a tower's size, which nobody resizes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def for_vllm(messages: Messages) -> Messages:
    """The same conversation as vLLM wants images in memory."""
    found = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image_pil", "image_pil": part["image"]} if "image" in part else part
                for part in content
            ]
        found.append({**message, "content": content})
    return found


def answers(outputs: Sequence[Any]) -> list[tuple[list[int], list[float]]]:
    """The ids of each answer with their log-probabilities."""
    found = []
    for output in outputs:
        made = output.outputs[0]
        steps = zip(made.token_ids, made.logprobs, strict=True)
        found.append((list(made.token_ids), [step[token].logprob for token, step in steps]))
    return found


class Graft:
    """A graft as `generate` runs it."""

    def __init__(self, run: Path) -> None:
        record = GraftFile.read(run)
        self.model = GraftedModel.from_pretrained(run, dtype=torch.float32)
        self.processor = load_processor(record, Path(record.base.id), self.model.vision_tower)

    @torch.no_grad()
    def answer(
        self, messages: Messages, new: int = NEW, workflow: str | None = None
    ) -> tuple[list[int], list[float]]:
        """Its greedy answer, with log-probabilities."""
        inputs = self.processor([messages])
        made = self.model.generate(
            **inputs, workflow=workflow, max_new_tokens=new, min_new_tokens=new, do_sample=False,
            eos_token_id=None, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        ids = made.sequences[0, -new:].tolist()
        rows = [row[0].log_softmax(-1) for row in made.logits]
        return ids, [float(row[token]) for row, token in zip(rows, ids, strict=True)]
