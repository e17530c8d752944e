"""Logits of the golden checkpoints, imported and run; test_official_parity says if they are right.

The folder that MMGRAFT_GOLDEN names holds the checkpoints of the published code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmgraft import GraftedModel
from reference.golden import IMAGE_ID, golden_case, golden_root, row_lengths, sample_ids
from unchanged.comparing import tensor_hash
from unchanged.conditions import one_thread
from unchanged.parts import command

PATCHES = 16
METHODS = ("iaa", "wings")
WORKFLOWS = {"Text": "text", "MM": "mm", "G": "grounding"}
SHOWN = 8
"""Number of values of a sample's logits that are recorded themselves."""


def there() -> bool:
    """Tell whether the golden checkpoints are here."""
    return golden_root() is not None


def cases() -> list[str]:
    """Every checkpoint; none where they are not here."""
    return sorted({case for method in METHODS for case, _ in sample_ids(method)})


def record(folder: Path, case: str) -> dict[str, Any]:
    """Import a checkpoint into `folder` and run all of its samples."""
    imported = folder / case
    imported.parent.mkdir(parents=True, exist_ok=True)
    command("import", golden_case(case).path, "--out", imported)
    model = GraftedModel.from_pretrained(imported)
    if case.startswith("iaa"):
        model.add_workflow("grounding", imported / "grounding")
    with one_thread(), torch.no_grad():
        return {name: _sample(model, case, name) for name in golden_case(case).samples}


def _sample(model: GraftedModel, case: str, name: str) -> dict[str, Any]:
    golden = golden_case(case)
    sample, note = golden.samples[name], golden.notes[name]
    workflow = WORKFLOWS[note["task_type"]] if case.startswith("iaa") else "mm"
    inputs = _expanded(sample)
    if "step_logits" in sample:
        out = model.generate(
            **inputs,
            workflow=workflow,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return {"said": out.sequences[:, -8:].tolist(), **_numbers(torch.stack(out.logits, 1))}
    logits = model(**inputs, workflow=workflow, use_cache=case.startswith("iaa")).logits
    lengths = row_lengths(sample, PATCHES)
    own = [row[:length] for row, length in zip(logits, lengths, strict=True)]
    return {"lengths": lengths, **_numbers(torch.cat(own))}


def _numbers(logits: Tensor) -> dict[str, Any]:
    flat = logits.float().flatten()
    places = torch.linspace(0, len(flat) - 1, SHOWN).long()
    return {"values": flat[places].tolist(), "sha256": tensor_hash(logits)}


def _expanded(sample: dict[str, Tensor]) -> dict[str, Any]:
    """The sample as mmgraft takes it: 16 positions of kind 1 an image, padded on the right."""
    ids = sample["input_ids"]
    real = sample.get("attention_mask", torch.ones_like(ids))
    rows, kinds = [], []
    for row, mask in zip(ids, real, strict=True):
        tokens = row[mask.bool()]
        repeats = torch.where(tokens == IMAGE_ID, PATCHES, 1)
        kinds.append((tokens == IMAGE_ID).long().repeat_interleave(repeats))
        rows.append(tokens.clamp(min=0).repeat_interleave(repeats))
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "mm_token_type_ids": pad(kinds, batch_first=True),
    }
    if "pixel_values" in sample:
        inputs["pixel_values"] = sample["pixel_values"]
        count = len(sample["pixel_values"])
        if count == len(inputs["input_ids"]):  # one a row; in a row of text of no positions
            inputs["image_rows"] = torch.arange(count)
            inputs["image_lengths"] = inputs["mm_token_type_ids"].sum(dim=1)
    return inputs
