"""Proof that a graft leaves text as it was: the base, loaded without mmgraft, says the same.

So too what a graft claims of text beside an image and before it (levels E1 and E2).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mmgraft.basefiles import ModelFiles, compare_fingerprints, fingerprint, load_whole, resolve
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.model.files.load import base_files
from mmgraft.model.modeling import GraftedModel
from mmgraft.progress import counted
from mmgraft.training.callbacks.text_change import PROMPTS

_BESIDE = 3  # rows of text in the batch that is compared


class LevelReport(Frozen):
    """Text of a batch with an image, against the base's on the same padded batch.

    Attributes:
        identical: Every logit bit for bit; of E2 every key and value of every layer too.
        max_difference: The largest difference between two of these numbers.
        positions: How many positions were compared.
    """

    identical: bool
    max_difference: float
    positions: int


def prove_levels(
    model: GraftedModel, processor: GraftProcessor, base: PreTrainedModel, prompts: Sequence[str]
) -> dict[str, LevelReport]:
    """Compare a batch of texts and of one row that shows an image between two texts.

    The base reads the same batch with the placeholder where the image stands: no text that is
    compared sees those positions.

    Args:
        model: The grafted model, in eval mode.
        processor: Its processor, with the tower's preprocessing.
        base: The untouched base, in the same dtype and attention.
        prompts: Texts; the first is what stands before the image.

    Returns:
        The levels that the graft claims.
    """
    inputs = _batch(processor, prompts)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    mask = inputs["attention_mask"]
    plain = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    if model._takes_positions:  # the base by itself would count the padding
        plain["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    promises = model.workflow().graft.promises
    with torch.no_grad():
        ours, theirs = (
            one(**given, use_cache=not promises.before)
            for one, given in ((model, inputs), (base, plain))
        )
    kinds, last = inputs["mm_token_type_ids"], len(mask) - 1
    before = (mask[last] == 1) & (kinds[last].cumsum(0) == 0)
    found = {}
    if not promises.beside:
        text = mask[:last].bool()
        found["E1"] = _compared([(ours.logits[:last][text], theirs.logits[:last][text])])
    if not promises.before:
        logits = ours.logits[last, before], theirs.logits[last, before]
        slots = [getattr(out.past_key_values, "layers", []) for out in (ours, theirs)]
        kept = [
            (one[last, :, before[-one.shape[2] :]], other[last, :, before[-one.shape[2] :]])
            for mine, base_slot in zip(*slots, strict=False)  # the graft's own slots come last
            if isinstance(getattr(base_slot, "keys", None), torch.Tensor)  # else a running state
            for one, other in ((mine.keys, base_slot.keys), (mine.values, base_slot.values))
        ]  # a sliding window keeps the last positions alone
        found["E2"] = _compared([logits, *kept])
    return found


def _batch(processor: GraftProcessor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return a few texts, and behind them a row with an image between two texts."""
    texts = [{"type": "text", "text": text} for text in (prompts[0], prompts[1 % len(prompts)])]
    shown = {"type": "image", "image": Image.linear_gradient("L").convert("RGB")}
    rows: list[Any] = [*prompts[:_BESIDE], [texts[0], shown, texts[1]]]
    return processor([[{"role": "user", "content": row}] for row in rows])


def _compared(pairs: Sequence[tuple[Tensor, Tensor]]) -> LevelReport:
    """Compare tensors, of which the first pair's first axis is positions."""
    same = all(torch.equal(one, other.to(one.device)) for one, other in pairs)
    apart = [one.float() - other.to(one.device).float() for one, other in pairs if one.numel()]
    largest = max((each.abs().max().item() for each in apart), default=0.0)
    return LevelReport(same, largest, len(pairs[0][0]))


_BATCH = 4  # prompts, padded on the left alike on both sides


class IdentityReport(Frozen):
    """A grafted model's text beside its base's.

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


def text_identity(
    model: GraftedModel,
    processor: GraftProcessor,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
) -> IdentityReport:
    """Compare text, from strings to logits, with a base that mmgraft has not touched.

    Args:
        model: The grafted model, in eval mode.
        processor: Its processor.
        base: The base as :func:`load_untouched` loads it, in the same dtype and attention.
        tokenizer: The base's own.
        prompts: The text of the one turn of each conversation.

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
    differences: list[str] = []
    largest, positions, digests = 0.0, 0, (hashlib.sha256(), hashlib.sha256())
    for start in counted("comparing with the base, batches", range(0, len(prompts), _BATCH)):
        chats = [[{"role": "user", "content": one}] for one in prompts[start : start + _BATCH]]
        ours = [processor.encode(one, where=f"the text {one[0]['content']!r}") for one in chats]
        for chat, own in zip(chats, ours, strict=True):
            if own.input_ids != _base_ids(tokenizer, chat, processor.options):
                differences.append(f"the ids of {chat[0]['content']!r}")
        inputs = processor.collate(ours, "left")
        plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        positions += int(inputs["attention_mask"].sum())
        mine, other = _logits(model, inputs), _logits(base, plain)  # (b, s, vocab)
        bits = _bytes(mine), _bytes(other)
        for digest, one in zip(digests, bits, strict=True):
            digest.update(one)
        if mine.shape != other.shape:
            differences.append(f"shape {tuple(mine.shape)}, not {tuple(other.shape)}")
            continue
        largest = max(largest, float((mine.float() - other.float()).abs().max()))
        if bits[0] != bits[1]:
            differences.append(f"logits of prompts {start + 1} to {start + len(chats)}")
    first = next(iter(differences), None)
    hexes = [digest.hexdigest() for digest in digests]
    return IdentityReport(first is None, largest, first, len(prompts), positions, *hexes)


class Untouched(Frozen):
    """A loaded base and what it is.

    Attributes:
        model: As transformers loads it, in eval mode, like the graft's own copy.
        tokenizer: Its own.
        fingerprint: One SHA-256 of its configuration and of the edges of every tensor.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str


def untouched_base(
    model: GraftedModel, run: Path, given: str | Path | None = None
) -> Untouched | None:
    """Load the base that text is compared with.

    Args:
        model: The graft, whose base's dtype, device and attention are taken.
        run: Its folder.
        given: Its folder or Hub id; by default what the graft's record says. For a
            trained base that is the one it was trained from.

    Returns:
        None where a trained base does not say, or no longer has, what it was trained from.

    Raises:
        UsageError: It is not the base that the record describes.
    """
    files = _files(model, run, given)
    if files is None:
        return None
    if files.gguf is not None:
        raise UsageError(
            f"{files.id} is a GGUF file, which text cannot be compared with; name a folder of "
            "safetensors"
        )
    now = fingerprint(files)
    record = model.workflow().record
    recorded = record.trained_from if record.base_trained else record.base
    if recorded is not None and recorded.fingerprint:
        difference = compare_fingerprints(recorded.fingerprint, now)
        if difference is not None:
            raise UsageError(
                f"{files.id} is not the base that this graft was made for: {difference}; name the "
                "right one"
            )
    loaded, tokenizer = load_untouched(files.path, model.base)
    digest = hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()
    return Untouched(loaded, tokenizer, digest)


def base_trained(model: GraftedModel) -> bool:
    """Return whether training has changed the base, and so text."""
    return model.workflow().record.base_trained or model.base_is_trained


def load_untouched(
    folder: str | Path, like: PreTrainedModel
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base and its tokenizer through transformers alone, as another copy of it is.

    Args:
        folder: The base's folder.
        like: The copy whose dtype, device, attention implementation and quantization are taken.
    """
    options: dict[str, Any] = {
        "dtype": like.dtype,
        "attn_implementation": like.config._attn_implementation,
    }
    quantized = getattr(like.config, "quantization_config", None)
    if quantized is not None:
        options["quantization_config"] = quantized
    loaded = load_whole(ModelFiles(str(folder), Path(folder)), **options)
    if quantized is None:
        torch.nn.Module.to(loaded, like.device)
    return loaded.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _files(model: GraftedModel, run: Path, given: str | Path | None) -> ModelFiles | None:
    if given is not None:
        return resolve(given)
    record = model.workflow().record
    if not record.base_trained:
        loaded_from = model.base.name_or_path
        if loaded_from and Path(loaded_from).is_dir():
            return resolve(loaded_from)
        return base_files(record, run)
    if record.trained_from is None:
        return None
    try:
        return resolve(record.trained_from.id, record.trained_from.revision)
    except UsageError:  # it was moved since
        return None


def _base_ids(
    tokenizer: PreTrainedTokenizerBase,
    chat: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(chat[0]["content"])["input_ids"])
    encoding: Any = tokenizer.apply_chat_template(
        [dict(message) for message in chat],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **options,
    )
    return list(encoding["input_ids"])


def _logits(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    device = getattr(model, "device", "cpu")
    with torch.no_grad():
        return model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits


def _bytes(logits: Tensor) -> bytes:
    return logits.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()
