"""Allocation: one option for each place, so that a sum of costs stays within a budget and a sum of errors is least.

The multiple-choice knapsack problem, solved by merging place after place and keeping the undominated states (Nemhauser
and Ullmann, Management Science 15, 1969). All budgets are solved at once: the result is the whole trade-off curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CELLS = 4096
"""Stretches of the cost axis of which two states are kept each; with fewer states than that the result is exact."""


@dataclass(frozen=True)
class Curve:
    """The undominated sums, cheapest first: costs rise, errors fall."""

    costs: NDArray[np.int64]
    errors: NDArray[np.float64]
    _steps: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]
    """Per place, for each state: the state before it and the option that was taken."""

    def __len__(self) -> int:
        return len(self.costs)

    def picks(self, point: int) -> tuple[int, ...]:
        """The option of each place at one point."""
        found: list[int] = []
        for before, option in reversed(self._steps):
            found.append(int(option[point]))
            point = int(before[point])
        return tuple(reversed(found))

    def within(self, budget: float) -> int | None:
        """The point of least error whose cost is at most ``budget``; None where there is none."""
        place = int(np.searchsorted(self.costs, budget, side="right")) - 1
        return place if place >= 0 else None

    def reaching(self, error: float) -> int | None:
        """The cheapest point whose error is at most ``error``; None where there is none."""
        enough = np.flatnonzero(self.errors <= error)
        return int(enough[0]) if len(enough) else None


def curve(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]]) -> Curve:
    """The trade-off of choosing one option per place.

    Args:
        costs: Per place, the cost of each option, not negative.
        errors: Per place, the error of each option; errors add up.
    """
    total_cost, total_error = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for cost, error in zip(costs, errors, strict=True):
        n, m = len(total_cost), len(cost)
        every_cost = (total_cost[:, None] + np.asarray(cost, np.int64)).ravel()
        every_error = (total_error[:, None] + np.asarray(error, np.float64)).ravel()
        before, option = np.divmod(np.arange(n * m), m)
        order = np.lexsort((every_error, every_cost))
        least = np.minimum.accumulate(every_error[order])
        better = np.concatenate([[True], least[1:] < least[:-1]])
        kept = _thinned(order[better], every_cost)
        total_cost, total_error = every_cost[kept], every_error[kept]
        steps.append((before[kept], option[kept]))
    return Curve(total_cost, total_error, tuple(steps))


def _thinned(kept: NDArray[np.int64], cost: NDArray[np.int64]) -> NDArray[np.int64]:
    """The cheapest and the best state of each stretch of the cost axis."""
    if len(kept) <= 2 * CELLS:
        return kept
    low, high = cost[kept[0]], cost[kept[-1]]
    cell = (cost[kept] - low) * CELLS // (high - low + 1)
    first = np.concatenate([[True], cell[1:] != cell[:-1]])
    last = np.concatenate([cell[1:] != cell[:-1], [True]])
    return kept[first | last]
