"""Proof that a graft leaves text as it was: the base, loaded without mmgraft, says the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.errors import UsageError
from mmgraft.training.callbacks.text_change import PROMPTS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mmgraft.data.chat.processor import GraftProcessor
    from mmgraft.model.modeling import GraftedModel


@dataclass(frozen=True)
class IdentityReport:
    """How a grafted model's text compares with its base's.

    Attributes:
        identical: Every prompt's text and ids, and every logit, bit for bit.
        max_difference: The largest difference between two logits.
        first_difference: In words where something differs, else None.
        prompts: How many were compared.
        positions: Token positions whose logits were compared.
        grafted: SHA-256 of all logits of the grafted model, in the order of the prompts.
        base: The same of the base.
    """

    identical: bool
    max_difference: float
    first_difference: str | None
    prompts: int
    positions: int
    grafted: str
    base: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a report file."""
        return asdict(self)


def text_identity(
    model: GraftedModel,
    processor: GraftProcessor,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    batch_size: int = 4,
) -> IdentityReport:
    """Compare text, from strings to logits, with a base that mmgraft has not touched.

    Args:
        model: The grafted model, in eval mode.
        processor: Its processor.
        base: The base as transformers loads it, in the same dtype and attention implementation;
            see :func:`load_untouched`.
        tokenizer: The base's own.
        prompts: What a user says in the one turn of each conversation.
        batch_size: Prompts at a time, padded on the left alike on both sides.

    Raises:
        UsageError: No prompt, or a base in another dtype, which could not be identical.
    """
    if not prompts:
        raise UsageError("no prompts to compare; give at least one")
    if base.dtype != model.base.dtype:
        raise UsageError(
            f"the grafted model computes in {model.base.dtype} and the base in {base.dtype}; load "
            "both in the same dtype"
        )
    difference: str | None = None
    largest, positions = 0.0, 0
    left, right = hashlib.sha256(), hashlib.sha256()
    for start in range(0, len(prompts), batch_size):
        chats = [[{"role": "user", "content": one}] for one in prompts[start : start + batch_size]]
        ours = [processor.encode(chat) for chat in chats]
        theirs = [_base_ids(tokenizer, chat) for chat in chats]
        for chat, own, base_ids in zip(chats, ours, theirs, strict=True):
            if own.input_ids != base_ids:
                difference = difference or f"the ids of {chat[0]['content']!r}"
        inputs = processor.collate(ours, "left")
        plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        mine = _logits(model, inputs)  # (b, s, vocab)
        other = _logits(base, plain)
        kept = inputs["attention_mask"].bool()
        positions += int(kept.sum())
        left.update(_bytes(mine))
        right.update(_bytes(other))
        if mine.shape != other.shape:
            difference = difference or f"shape {tuple(mine.shape)}, not {tuple(other.shape)}"
            continue
        largest = max(largest, float((mine.float() - other.float()).abs().max()))
        if _bytes(mine) != _bytes(other):
            difference = difference or f"logits of prompts {start + 1} to {start + len(chats)}"
    return IdentityReport(
        identical=difference is None,
        max_difference=largest,
        first_difference=difference,
        prompts=len(prompts),
        positions=positions,
        grafted=left.hexdigest(),
        base=right.hexdigest(),
    )


def load_untouched(
    folder: str | Path, like: PreTrainedModel
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base and its tokenizer through transformers alone, loaded as another copy of it is.

    Args:
        folder: Where the base lies.
        like: The copy whose dtype, device, attention implementation and quantization are taken.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {
        "dtype": like.dtype,
        "attn_implementation": like.config._attn_implementation,
    }
    quantized = getattr(like.config, "quantization_config", None)
    if quantized is not None:
        options["quantization_config"] = quantized
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
    if quantized is None:
        torch.nn.Module.to(loaded, like.device)
    return loaded.eval(), AutoTokenizer.from_pretrained(folder)


def _base_ids(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, str]]) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(chat[0]["content"])["input_ids"])
    encoding: Any = tokenizer.apply_chat_template(
        [dict(message) for message in chat],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    return list(encoding["input_ids"])


def _logits(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    import torch

    device = getattr(model, "device", "cpu")
    with torch.no_grad():
        return model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits


def _bytes(logits: Tensor) -> bytes:
    import torch

    return logits.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()
