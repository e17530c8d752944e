"""Greedy ids of a graft and of llama.cpp's server, where the likeliest two lie apart."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llama_server import LlamaServer
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import load_processor
from mmgraft.model.modeling import GraftedModel

MARGIN = 0.02
"""Log-probability between the likeliest two tokens, below which their order says nothing."""

ENDS = ("<|eos|>", "<|im_end|>", "<|endoftext|>")
"""Tokens that llama.cpp takes for the end of an answer: `served` forbids them, and so do we."""


def noise(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    """An image without symmetries."""
    made = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(made)


def as_png(image: Image.Image) -> str:
    """The bytes of a PNG, base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def served(
    server: LlamaServer, text: str | None, *images: Image.Image, count: int = 10
) -> tuple[str, list[int]]:
    """The prompt that the template writes, images first, and the ids of the answer."""
    pictures = [as_png(image) for image in images]
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        for data in pictures
    ]
    content: Any = [*parts, {"type": "text", "text": text}] if parts else text
    messages = [{"role": "user", "content": content}]
    prompt = server.post("/apply-template", messages=messages)["prompt"]
    body: dict[str, Any] = {"prompt_string": prompt, "multimodal_data": pictures}
    answer = server.post(
        "/completion", prompt=body if pictures else prompt, temperature=0, n_predict=count,
        return_tokens=True, ignore_eos=True, cache_prompt=False,
    )  # fmt: skip
    return prompt, answer["tokens"]


class OwnGraft:
    """A graft that mmgraft runs, in fp32."""

    def __init__(self, run: Path, base: Path | None = None) -> None:
        self.record = GraftFile.read(run)
        self.model = GraftedModel.from_pretrained(run, dtype=torch.float32).eval()
        tower = self.model.vision_tower
        self.processor = load_processor(self.record, base or Path(self.record.base.id), tower)
        words = self.processor.tokenizer.get_vocab()
        self.ends = [words[one] for one in ENDS if one in words]

    @torch.no_grad()
    def likeliest(
        self, given: list[int], text: str, *images: Image.Image
    ) -> list[tuple[int, float]]:
        """The likeliest token before each given one, and how far the second is behind."""
        parts: Any = [{"type": "image", "image": image} for image in images]
        content = [*parts, {"type": "text", "text": text}] if images else text
        inputs = dict(self.processor([{"role": "user", "content": content}]))
        inputs.pop("attention_mask", None)
        start = inputs["input_ids"].shape[1]
        new = torch.tensor([given])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(new)], 1)
        logits = self.model(**inputs, workflow=self.record.workflow, use_cache=False).logits[0]
        logits[:, self.ends] = -torch.inf
        top = logits[start - 1 : -1].topk(2)
        behind = (top.values[:, 0] - top.values[:, 1]).tolist()
        return list(zip(top.indices[:, 0].tolist(), behind, strict=True))


def disagreements(given: list[int], own: list[tuple[int, float]]) -> list[int]:
    """Steps at which the server took another token, the likeliest two lying apart."""
    return [
        step
        for step, (token, (wanted, behind)) in enumerate(zip(given, own, strict=True))
        if token != wanted and behind > MARGIN
    ]
