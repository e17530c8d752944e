"""The processor of a graft: the base's tokenizer, the graft's template, the tower's pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mmgraft.data.chat.processor import GraftProcessor, Preprocess
from mmgraft.data.chat.template import Template
from mmgraft.errors import UsageError
from mmgraft.model.files.graft_file import GraftFile


def load_processor(
    record: GraftFile,
    tokenizer_folder: str | Path,
    num_patches: int,
    preprocess: Preprocess | None,
    options: Mapping[str, Any] | None = None,
) -> GraftProcessor:
    """Make the processor that a graft's record describes.

    Args:
        record: The graft's ``graft_config.json``.
        tokenizer_folder: Where the base's tokenizer lies.
        num_patches: Positions of one image, as the tower says.
        preprocess: The tower's; None for text alone.
        options: Variables of the chat template, such as ``enable_thinking``.

    Raises:
        UsageError: The base has no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the base {record.base.id} has no tokenizer that transformers can load ({error}); "
            "put its tokenizer files beside its weights."
        ) from None
    template = Template(record.template.kind, record.template.text)
    return GraftProcessor(
        tokenizer, num_patches, record.image_token.id, template, preprocess, options
    )
