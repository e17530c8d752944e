"""What a metric found on each item, and the numbers made of it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmgraft.evaluation.metrics.intervals import Estimate, Statistic, estimate, paired, ratio


@dataclass(frozen=True)
class Measured:
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
    def means(cls, **values: Sequence[float] | Sequence[bool]) -> Measured:
        """Scores that are means of one number an item; the first is the main one."""
        lists = [np.asarray(one, dtype=np.float64) for one in values.values()]
        columns = np.stack([*lists, np.ones_like(lists[0])], axis=-1)
        return cls(
            columns, {name: share(at, -1) for at, name in enumerate(values)}, next(iter(values))
        )

    def of(self, places: Sequence[int]) -> Measured:
        """The same of some of the items, by position."""
        return Measured(self.columns[list(places)], self.statistics, self.main)

    def beside(self, other: Measured) -> Measured:
        """These scores and those of another metric on the same items."""
        width = self.columns.shape[1]

        def moved(statistic: Statistic) -> Statistic:
            return lambda sums: statistic(sums[..., width:])

        def kept(statistic: Statistic) -> Statistic:
            return lambda sums: statistic(sums[..., :width])

        statistics = {name: kept(one) for name, one in self.statistics.items()}
        statistics.update((name, moved(one)) for name, one in other.statistics.items())
        columns = np.concatenate([self.columns, other.columns], axis=1)
        return Measured(columns, statistics, self.main)

    def values(self) -> dict[str, float]:
        """The scores alone, without intervals."""
        sums = self.columns.sum(axis=0)
        return {name: float(statistic(sums)) for name, statistic in self.statistics.items()}

    def scores(
        self, groups: Sequence[Hashable] | None = None, seed: int = 0
    ) -> dict[str, Estimate]:
        """Every score with its interval; see :func:`mmgraft.evaluation.metrics.intervals.estimate`.

        Raises:
            UsageError: There is no item, or not one group an item.
        """
        return {
            name: estimate(self.columns, statistic, groups, seed=seed)
            for name, statistic in self.statistics.items()
        }

    def change(
        self, before: Measured, groups: Sequence[Hashable] | None = None, seed: int = 0
    ) -> dict[str, Estimate]:
        """How every score differs from another measurement of the same items, in the same order.

        Raises:
            UsageError: There is no item, or not as many before.
        """
        return {
            name: paired(self.columns, before.columns, statistic, groups, seed=seed)
            for name, statistic in self.statistics.items()
        }


def share(above: int, below: int) -> Statistic:
    """The statistic that divides one column's sum by another's; 0 where that is 0."""

    def statistic(sums: np.ndarray) -> np.ndarray:
        return ratio(np.stack([sums[..., above], sums[..., below]], axis=-1))

    return statistic
