"""The packaged sets of text as files of their own, every row in one form."""

from __future__ import annotations

from typing import Any

from mmgraft.demo.draft import Draft, rows_writer
from mmgraft.evaluation.items.files import read_items
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.items.packaged_text import PACKAGED
from mmgraft.recipes.evaluation_set import SetSpec


def draft(name: str) -> Draft:
    """One set as NAME.jsonl: a text a row, or a question with its options and the right one.

    Raises:
        UsageError: The package is not installed; the message has the line that installs it.
        MMGraftError: The package is there without the file.
    """
    spec = SetSpec(name=name, metric=PACKAGED[name].metric, modality="text")
    rows = [_row(item) for item in read_items(spec)]
    file = f"{name}.jsonl"
    return Draft(writers={file: rows_writer(rows)}, rows={file: len(rows)})


def _row(item: Item) -> dict[str, Any]:
    if not item.options:
        return {"id": item.id, "text": item.question}
    return {
        "id": item.id,
        "question": item.question,
        "options": list(item.options),
        "answer": item.gold,
        "group": item.group,
    }
