"""Values of a metric on each item, and the numbers made of them, with bootstrap intervals."""

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.runs.results import Score

RESAMPLES = 1000
LEVEL = 0.95
Statistic = Callable[[np.ndarray], np.ndarray]
Groups = Sequence[Hashable] | None


def ratio(sums: np.ndarray) -> np.ndarray:
    """Divide the first sum by the second, ``(..., 2) -> (...)``; 0 where the second is 0."""
    below = sums[..., 1]
    return np.divide(sums[..., 0], below, out=np.zeros(below.shape), where=below != 0)


def share(above: int, below: int) -> Statistic:
    """Return the statistic that divides one column's sum by another's; 0 where that is 0."""
    return lambda sums: ratio(np.stack([sums[..., above], sums[..., below]], axis=-1))


def estimate(
    columns: Sequence[Sequence[float]] | np.ndarray,
    statistic: Statistic = ratio,
    groups: Groups = None,
) -> Score:
    """Compute a statistic of sums over items, with its 95 % percentile bootstrap interval.

    A mean is the ratio of the columns (value, 1); perplexity is ``exp`` of the ratio of (negative
    log-likelihood, tokens); precision is the ratio of (true positives, predicted positives).

    Args:
        columns: What is summed, ``(items, k)``.
        statistic: From sums ``(..., k)`` to ``(...)``, without loops over the leading dimensions.
        groups: What items belong together, such as those about one image: groups are resampled
            whole, because such items are right or wrong together. Default: each by itself.

    Raises:
        UsageError: There is no item.
    """
    table = np.asarray(columns, dtype=np.float64)
    if not len(table):
        raise UsageError("no items to score; give at least one")
    sums = _by_group(table, groups)  # (groups, k)
    # How often each group is sampled, so that memory stays at resamples x groups.
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    low, high = interval_of(statistic(counts @ sums))
    value = float(statistic(table.sum(0)))
    return Score(value=value, low=low, high=high, count=len(table), groups=len(sums))


def interval_of(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the ends of the percentile interval of resampled values."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def mean(values: Sequence[float] | Sequence[bool] | np.ndarray, groups: Groups = None) -> Score:
    """Compute the mean of one number an item, with its interval; see :func:`estimate`."""
    return estimate(Measured.means(mean=values).columns, ratio, groups)


def paired(
    after: Sequence[Sequence[float]] | np.ndarray,
    before: Sequence[Sequence[float]] | np.ndarray,
    statistic: Statistic = ratio,
    groups: Groups = None,
) -> Score:
    """Compute how a statistic differs between two measurements of the same items.

    Both are resampled together, so what the items themselves vary by cancels; whether the interval
    excludes zero is :attr:`Score.resolved`.

    Args:
        after: Columns of one, ``(items, k)``, as for :func:`estimate`.
        before: Columns of the other, in the same order of items; it is subtracted.
        statistic: See :func:`estimate`.
        groups: See :func:`estimate`.

    Raises:
        UsageError: No items, or not the same number of them.
    """
    one, two = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if one.shape != two.shape:
        raise UsageError(
            f"{len(one)} items were measured after and {len(two)} before; measure the same items"
        )
    width = one.shape[1]
    return estimate(
        np.concatenate([one, two], axis=1),
        lambda sums: statistic(sums[..., :width]) - statistic(sums[..., width:]),
        groups,
    )


def _by_group(table: np.ndarray, groups: Groups) -> np.ndarray:
    if groups is None:
        return table
    if len(groups) != len(table):
        raise UsageError(f"{len(table)} items and {len(groups)} groups; give each item its group")
    numbers: dict[Hashable, int] = {}
    indices = [numbers.setdefault(group, len(numbers)) for group in groups]
    sums = np.zeros((len(numbers), table.shape[1]))
    np.add.at(sums, indices, table)
    return sums


class Measured(Frozen):
    """A metric's columns, one row an item, and its scores, which are statistics of their sums.

    The same object gives the whole set, one kind of question, and the paired difference to another
    measurement of the same items.

    Attributes:
        columns: What is summed over items, ``(items, k)``.
        statistics: The scores by name, each from sums ``(..., k)`` to ``(...)``.
        main: Name of the score that a table shows.
    """

    columns: np.ndarray
    statistics: Mapping[str, Statistic]
    main: str

    @classmethod
    def means(cls, **values: Sequence[float] | Sequence[bool] | np.ndarray) -> "Measured":
        """Make scores that are means of one number an item; the first is the main one."""
        lists = [np.asarray(one, dtype=np.float64) for one in values.values()]
        columns = np.stack([*lists, np.ones_like(lists[0])], axis=-1)
        statistics = {name: share(at, -1) for at, name in enumerate(values)}
        return cls(columns, statistics, next(iter(values)))

    def of(self, indices: Sequence[int]) -> "Measured":
        """Return the same of some of the items, by index."""
        return Measured(self.columns[list(indices)], self.statistics, self.main)

    def beside(self, other: "Measured") -> "Measured":
        """Return these scores and those of another metric on the same items."""
        width = self.columns.shape[1]
        parts = (slice(None, width), self.statistics), (slice(width, None), other.statistics)
        statistics = {
            name: lambda sums, part=part, one=one: one(sums[..., part])
            for part, several in parts
            for name, one in several.items()
        }
        columns = np.concatenate([self.columns, other.columns], axis=1)
        return Measured(columns, statistics, self.main)

    def values(self) -> dict[str, float]:
        """Return the scores alone, without intervals."""
        sums = self.columns.sum(axis=0)
        return {name: float(statistic(sums)) for name, statistic in self.statistics.items()}

    def scores(self, groups: Groups = None) -> dict[str, Score]:
        """Return every score with its interval; see :func:`estimate`.

        Raises:
            UsageError: There is no item, or not one group an item.
        """
        return {
            name: estimate(self.columns, statistic, groups)
            for name, statistic in self.statistics.items()
        }

    def change(self, before: "Measured", groups: Groups = None) -> dict[str, Score]:
        """Return how every score differs from another measurement of the same items, in order.

        Raises:
            UsageError: There is no item, or not as many before.
        """
        return {
            name: paired(self.columns, before.columns, statistic, groups)
            for name, statistic in self.statistics.items()
        }


def over_seeds(
    after: Sequence[Measured], before: Sequence[Measured] = (), groups: Groups = None
) -> Score:
    """Compute the main score of one or several trainings, or its difference to others'.

    Items are resampled alike on both sides, and of several trainings a side, these too; items
    alone where each side has one. A bootstrap of few seeds is narrower than it should be.

    Args:
        after: The same training with each seed, measured on the same items.
        before: Others on these items, whose main score is subtracted.
        groups: See :func:`estimate`.

    Raises:
        UsageError: Not one group an item.
    """
    rng = np.random.default_rng(0)
    size = len(_by_group(after[0].columns, groups))
    counts = rng.multinomial(size, np.full(size, 1 / size), size=RESAMPLES)
    value, drawn = 0.0, np.zeros(RESAMPLES)
    for sign, side in ((1, after), (-1, before)):
        if not side:
            continue
        statistic = side[0].statistics[after[0].main]
        sums = np.stack([_by_group(one.columns, groups) for one in side])  # (seeds, groups, k)
        seeds = rng.multinomial(len(side), np.full(len(side), 1 / len(side)), size=RESAMPLES)
        value += sign * float(statistic(sums.sum((0, 1))))
        drawn += sign * statistic(np.einsum("rs,srk->rk", seeds, counts @ sums))
    low, high = interval_of(drawn)
    return Score(value=value, low=low, high=high, count=len(after[0].columns), groups=size)
