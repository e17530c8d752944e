"""Several rows in one sequence: where each begins, and whether a base keeps them apart.

A packed batch says with ``segments (b, s)`` which row of its sequence every position belongs to.
Its positions begin anew with each row, and transformers makes a mask from them in which no token
attends to another row's (``masking_utils``, where no attention mask is given).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmgraft.anatomy import Anatomy, get_path
from mmgraft.data.batches.sequences import number
from mmgraft.errors import UsageError
from mmgraft.grafts.computing import is_flash

_PROBE = (5, 6)  # positions of the two rows that a base is tried with
_NEAR = 1e-3  # of the states' own size: rounding is below, another row above
_NEAR_IN_HALF = 0.1


def refuse_beside(segments: Tensor, shape: Sequence[int], cache: Any) -> None:
    """Refuse what does not go with a packed batch.

    Raises:
        UsageError: Segments of another shape than the ids, or a cache.
    """
    if segments.shape != torch.Size(shape):
        raise UsageError(
            f"segments have the shape {tuple(segments.shape)} and the ids {tuple(shape)}; give "
            "every position the number of its row, 0 at padding."
        )
    if cache is not None:
        raise UsageError("a packed batch takes no cache: give one row a sequence to decode.")


def packing_blocked(
    base: PreTrainedModel, anatomy: Anatomy, takes_positions: bool, sequences: int
) -> str | None:
    """Why rows in one sequence of this base would not be what they are alone; None if they are.

    The base is tried: a row behind another one in a sequence against the same row alone, in so many
    sequences side by side (flash attention tells rows of one sequence apart and of several not).
    """
    if not takes_positions:
        return "it takes no positions, which tell rows apart"
    kernel = str(base.config._attn_implementation)
    half = takes_half(base)
    near = _NEAR_IN_HALF if half or base.dtype != torch.float32 else _NEAR
    before, length = _PROBE
    embedding = get_path(base, anatomy.embedding_path)
    device = next(embedding.parameters()).device
    ids = torch.arange(1, before + length + 3, device=device)[None] % anatomy.vocab_size
    ids = ids.expand(sequences, -1)
    segments = torch.ones_like(ids).index_fill(1, torch.arange(before, ids.shape[1]).to(device), 2)
    segments[:, before + length :] = 0
    alone = slice(before, before + length)
    trains = base.training
    base.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            whole = _states(base, anatomy.trunk_path, ids, number(segments)[1])[-1:, alone]
            first = torch.arange(length, device=device)[None]
            one = _states(base, anatomy.trunk_path, ids[:1, alone], first)
    finally:
        base.train(trains)
    off = ((whole - one).norm() / one.norm()).item()
    if off < near:
        return None
    running = next((why for why in anatomy.blocked.values() if "running state" in why), None)
    many = "" if sequences == 1 else " where a batch has several sequences"
    return running or f"with {kernel} attention its code lets one row see another{many}"


def takes_half(base: PreTrainedModel) -> bool:
    """Tell whether a base in fp32 runs only under autocast: a flash package refuses fp32."""
    return base.dtype == torch.float32 and is_flash(str(base.config._attn_implementation))


def _states(base: PreTrainedModel, trunk: str, ids: Tensor, positions: Tensor) -> Tensor:
    """Return the final hidden states ``(b, s, h)`` in fp32."""
    out = get_path(base, trunk)(input_ids=ids, position_ids=positions, use_cache=False)
    return out.last_hidden_state.float()
