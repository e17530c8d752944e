"""The base that a graft was made for, as mmgraft has never touched it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.basefiles import ModelFiles, compare_fingerprints, fingerprint, resolve
from mmgraft.errors import UsageError
from mmgraft.evaluation.identity import load_untouched
from mmgraft.model.files.load import base_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mmgraft.model.files.graft_file import BaseReference
    from mmgraft.model.modeling import GraftedModel


@dataclass(frozen=True)
class Untouched:
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
        given: Where that base lies, or its Hub id; by default what the graft's record says. For a
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
    recorded = _reference(model)
    if recorded is not None and recorded.fingerprint:
        difference = compare_fingerprints(recorded.fingerprint, now)
        if difference is not None:
            raise UsageError(
                f"{files.id} is not the base that this graft was made for: {difference}; name the "
                "right one"
            )
    loaded, tokenizer = load_untouched(files.path, model.base)
    return Untouched(loaded, tokenizer, _digest(now))


def base_trained(model: GraftedModel) -> bool:
    """Whether training has changed the base, and so text."""
    return model.workflow().record.base_trained or model.base_is_trained


def _reference(model: GraftedModel) -> BaseReference | None:
    record = model.workflow().record
    return record.trained_from if record.base_trained else record.base


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


def _digest(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
