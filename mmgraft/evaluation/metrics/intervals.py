"""Numbers with their bootstrap intervals, alone and paired."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mmgraft.errors import UsageError

RESAMPLES = 1000
LEVEL = 0.95
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A measured number and its 95 % percentile bootstrap interval.

    Attributes:
        value: Of all items.
        low: Lower end of the interval.
        high: Upper end.
        count: Items.
        groups: What was drawn: the items themselves, or what they belong to. Of one group nothing
            else can be drawn, so that its interval has no width and says nothing. None: not known.
    """

    value: float
    low: float
    high: float
    count: int
    groups: int | None = None

    def __str__(self) -> str:
        """`0.823 (0.800 to 0.846)`."""
        ends = f"{self.low:.3f} to {self.high:.3f}" if self.groups != 1 else "one group"
        return f"{self.value:.3f} ({ends})"

    @property
    def resolved(self) -> bool:
        """For a difference: whether the interval leaves zero out, and is of several groups."""
        return self.groups != 1 and (self.low > 0 or self.high < 0)

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain data for a report."""
        return asdict(self)


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first sum by the second, ``(..., 2) -> (...)``; 0 where the second is 0."""
    below = sums[..., 1]
    return np.divide(sums[..., 0], below, out=np.zeros(below.shape), where=below != 0)


def estimate(
    columns: Sequence[Sequence[float]] | np.ndarray,
    statistic: Statistic = ratio,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of sums over items, with its interval.

    A mean is the ratio of the columns (value, 1); perplexity is ``exp`` of the ratio of (negative
    log-likelihood, tokens); precision is the ratio of (true positives, predicted positives).

    Args:
        columns: What is summed, ``(items, k)``.
        statistic: From sums ``(..., k)`` to ``(...)``, without loops over the leading dimensions.
        groups: What items belong together, such as those about one picture: groups are drawn
            whole, since such items are right or wrong together. Default: each by itself.
        resamples: How often to draw.
        seed: Of the draws.

    Raises:
        UsageError: There is no item.
    """
    table = np.asarray(columns, dtype=np.float64)
    if not len(table):
        raise UsageError("no items to score; give at least one")
    sums = _by_group(table, groups)  # (groups, k)
    # Each group's number of draws, so that memory stays at resamples x groups.
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
    values = statistic(drawn @ sums)  # (resamples,)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    whole = float(statistic(table.sum(0)))
    return Estimate(whole, float(low), float(high), len(table), len(sums))


def mean(
    values: Sequence[float] | Sequence[bool] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of one number an item, with its interval; see :func:`estimate`."""
    numbers = np.asarray(values, dtype=np.float64)
    table = np.stack([numbers, np.ones_like(numbers)], axis=-1) if len(numbers) else numbers
    return estimate(table, ratio, groups, resamples, seed)


def paired(
    after: Sequence[Sequence[float]] | np.ndarray,
    before: Sequence[Sequence[float]] | np.ndarray,
    statistic: Statistic = ratio,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """How a statistic differs between two measurements of the same items, after minus before.

    Both are drawn together, so what the items themselves vary by cancels; whether the interval
    leaves zero out is :attr:`Estimate.resolved`.

    Args:
        after: Columns of one, ``(items, k)``, as for :func:`estimate`.
        before: Columns of the other, in the same order of items.
        statistic: See :func:`estimate`.
        groups: See :func:`estimate`.
        resamples: How often to draw.
        seed: Of the draws.

    Raises:
        UsageError: No items, or not the same number of them.
    """
    one, two = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if one.shape != two.shape:
        raise UsageError(
            f"{len(one)} items were measured after and {len(two)} before; measure the same items"
        )
    if not len(one):
        raise UsageError("no items to score; give at least one")
    width = one.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        return statistic(sums[..., :width]) - statistic(sums[..., width:])

    return estimate(np.concatenate([one, two], axis=1), difference, groups, resamples, seed)


def _by_group(table: np.ndarray, groups: Sequence[Hashable] | None) -> np.ndarray:
    if groups is None:
        return table
    if len(groups) != len(table):
        raise UsageError(f"{len(table)} items and {len(groups)} groups; give each item its group")
    numbers: dict[Hashable, int] = {}
    places = [numbers.setdefault(group, len(numbers)) for group in groups]
    sums = np.zeros((len(numbers), table.shape[1]))
    np.add.at(sums, places, table)
    return sums
