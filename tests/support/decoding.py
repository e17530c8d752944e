"""Decoding from a cache, chunk by chunk, for a base or a grafted model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grafting import distance, image_count, logits_of, taken
from mmgraft import GraftedModel

# Left-padded to 19: two images, the second one in the second chunk; one image; no image at all.
WORDS = ("ttiiiitttiiiittt", "ttttiiiittttttttttt", "ttttttttttttt")
CHUNKS = (12, 16, 17, 18, 19)  # three columns of text, a chunk of one image, then single tokens


@torch.no_grad()
def in_chunks(
    model: Any,
    inputs: dict[str, Tensor],
    ends: tuple[int, ...] = CHUNKS,
    cache: Any = None,
    **options: Any,
) -> Tensor:
    """Logits of all positions, from one cache that is filled chunk by chunk."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    kinds = inputs.get("mm_token_type_ids")
    features, logits, start, cached = inputs.get("image_features"), [], 0, cache
    owners: list[tuple[int, int]] = []  # row and last column of each image
    if kinds is not None:
        for number, line in enumerate(kinds):
            owners += [(number, int(at)) for at in line.nonzero().flatten()[taken() - 1 :: taken()]]
    for end in ends:
        given = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        if kinds is not None and kinds[:, start:end].any():
            shown = [n for n, (_, last) in enumerate(owners) if start <= last < end]
            given["mm_token_type_ids"] = kinds[:, start:end]
            given["image_features"] = features[shown]
        if not isinstance(model, GraftedModel):
            positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)
            given["position_ids"] = positions[:, start:]
        out = model(**given, past_key_values=cached, use_cache=True, **options)
        cached = out.past_key_values
        logits.append(out.logits)
        start = end
    return torch.cat(logits, dim=1)


def placed(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, with the positions that a base has to be told and a grafted model finds."""
    if isinstance(model, GraftedModel):
        return inputs
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def worst(model: Any, inputs: dict[str, Tensor], **options: Any) -> float:
    """Largest difference between cached decoding and the full forward at real positions."""
    real = inputs["attention_mask"].bool()
    found = in_chunks(model, inputs, **options)[real]
    return distance(found, logits_of(model, placed(model, inputs), **options)[real])


def differences(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Largest difference of cached decoding from the full forward at each real position."""
    real = inputs["attention_mask"].bool()
    found, expected = in_chunks(model, inputs)[real], logits_of(model, placed(model, inputs))[real]
    return (found.float() - expected.float()).abs().amax(-1)


def changed_at(inputs: dict[str, Tensor], column: int) -> dict[str, Tensor]:
    """The batch with another token, or another patch of the image, at one column of every row."""
    ids, features = inputs["input_ids"].clone(), inputs["image_features"].clone()
    kinds, first = inputs["mm_token_type_ids"], 0
    for number, line in enumerate(kinds):
        if line[column]:
            patch = int(line[:column].sum())
            features[first + patch // taken(), patch % taken()] += 1.0
        else:
            ids[number, column] = 6 + (int(ids[number, column]) - 6 + 17) % 290
        first += image_count(line)
    return {**inputs, "input_ids": ids, "image_features": features}
