"""The processor of a graft: the base's tokenizer, the graft's template, the tower's pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import Template
from mmgraft.errors import UsageError
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.vision.towers.base import VisionTower
from mmgraft.vision.towers.registry import TowerShape


def load_processor(
    record: GraftFile,
    tokenizer_folder: str | Path,
    tower: VisionTower | TowerShape | None,
    options: Mapping[str, Any] | None = None,
) -> GraftProcessor:
    """Make the processor that a graft's record describes.

    Args:
        record: The graft's ``graft_config.json``.
        tokenizer_folder: Where the base's tokenizer lies.
        tower: The tower that images go through; its shape is enough to count their positions.
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
    shape = tower if isinstance(tower, TowerShape) else tower and TowerShape.of(tower)
    positions = 1 if shape is None else shape.positions(record.projector)
    preprocess = getattr(tower, "preprocess", None)
    return GraftProcessor(
        tokenizer, positions, record.image_token.id, template, preprocess, options
    )
