"""The longest sequence of a base that looks positions up in a table of fixed size."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


def position_table(model: PreTrainedModel, config: PreTrainedConfig) -> int | None:
    """Return the length of a base's table of positions; None where it computes them, as rotary.

    A table is an embedding beside that of tokens, or a tensor that is no weight, whose size is the
    longest sequence that the configuration states.

    Args:
        model: The base, on any device.
        config: Of its text.
    """
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int):
        # MPT makes its ALiBi for so many positions and no more.
        most = getattr(config, "max_seq_len", None)
        return most if isinstance(most, int) else None
    return stated if stated in set(_sizes(model)) else None


def _sizes(model: PreTrainedModel) -> Iterator[int]:
    """Yield sizes of all that might be a table of positions."""
    tokens = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            if module is not tokens:  # OPT's first two entries are no positions
                yield module.num_embeddings - int(getattr(module, "offset", 0))
            continue
        held = {**module._buffers, **vars(module)}  # GPT-J's and CTRL's tables are no parameters
        for tensor in held.values():
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                yield from tensor.shape[:1] if tensor.dim() == 2 else ()
