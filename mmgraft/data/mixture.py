"""Several sources as one list of rows, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmgraft.data.rows import Row
from mmgraft.errors import UsageError


@dataclass(frozen=True)
class Part:
    """Rows of one source and how often an epoch shows each: 2 is twice, 0.5 is every other one."""

    rows: Sequence[Row]
    weight: float = 1.0


def mix(parts: Sequence[Part], seed: int = 0, limit: int | None = None) -> list[Row]:
    """Put sources together and shuffle them.

    A source of n rows and weight w gives round(n w) rows: every row floor(w) times, and a drawn
    sample for the rest. What is drawn of a source depends on the seed and on its place in the list,
    not on the other sources.

    Args:
        parts: the sources.
        seed: decides what is drawn and the order.
        limit: keep this many rows of the shuffled mixture.

    Raises:
        UsageError: for a weight that is not above 0, or a mixture without rows.
    """
    mixed: list[Row] = []
    for index, part in enumerate(parts):
        if part.weight <= 0:
            raise UsageError(f"a data weight of {part.weight}; write one above 0, or leave it out")
        wanted = round(len(part.rows) * part.weight)
        whole, rest = divmod(wanted, len(part.rows)) if part.rows else (0, 0)
        mixed += list(part.rows) * whole
        drawn = random.Random(f"{seed} {index}").sample(range(len(part.rows)), rest)
        mixed += [part.rows[at] for at in sorted(drawn)]
    random.Random(f"{seed} order").shuffle(mixed)
    if limit is not None:
        mixed = mixed[:limit]
    if not mixed:
        raise UsageError("the data has no rows; set the files, weights and limits to give some")
    return mixed
