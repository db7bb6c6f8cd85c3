"""The trade-off curve: what it says is the best there is, for every budget."""

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import qc.compiler.allocation as allocation
from qc.compiler.allocation import curve

OPTIONS = st.lists(st.tuples(st.integers(0, 60), st.floats(0, 10)), min_size=1, max_size=3)
PLACES = st.lists(OPTIONS, min_size=1, max_size=5)


@given(places=PLACES, budget=st.integers(0, 300))
def test_no_choice_within_the_budget_is_better(places: list[list[tuple[int, float]]], budget: int) -> None:
    found = curve([[c for c, _ in place] for place in places], [[e for _, e in place] for place in places])
    sums = [
        (sum(place[k][0] for place, k in zip(places, picks, strict=True)),
         sum(place[k][1] for place, k in zip(places, picks, strict=True)))
        for picks in product(*(range(len(place)) for place in places))
    ]  # fmt: skip
    within = [error for cost, error in sums if cost <= budget]
    point = found.within(budget)
    assert (point is None) == (not within)
    if point is not None:
        assert np.isclose(found.errors[point], min(within), atol=1e-9)
        picks = found.picks(point)
        assert sum(place[k][0] for place, k in zip(places, picks, strict=True)) == found.costs[point]
        assert np.isclose(sum(p[k][1] for p, k in zip(places, picks, strict=True)), found.errors[point])
    assert (np.diff(found.costs) > 0).all()
    assert (np.diff(found.errors) < 0).all()


@given(places=PLACES, error=st.floats(0, 40))
def test_the_cheapest_that_is_good_enough(places: list[list[tuple[int, float]]], error: float) -> None:
    found = curve([[c for c, _ in place] for place in places], [[e for _, e in place] for place in places])
    point = found.reaching(error)
    if point is None:
        assert found.errors[-1] > error
    else:
        assert found.errors[point] <= error
        assert point == 0 or found.errors[point - 1] > error


def test_many_places_stay_within_the_budget_and_near_the_best() -> None:
    """With more states than are kept, a choice is still one that the budget pays."""
    random = np.random.default_rng(0)
    costs = [[4 * w, 8 * w, 16 * w] for w in random.integers(10_000, 99_999, 120).tolist()]
    errors = [[e, e / 100, 0.0] for e in random.exponential(1.0, 120).tolist()]
    found = curve(costs, errors)
    assert len(found) <= 2 * allocation.CELLS
    budget = 7 * sum(c[0] for c in costs) // 4
    point = found.within(budget)
    assert point is not None
    picks = found.picks(point)
    assert sum(c[k] for c, k in zip(costs, picks, strict=True)) <= budget
    total = sum(e[k] for e, k in zip(errors, picks, strict=True))
    gains = sorted(
        ((e[0] - e[1]) / (c[1] - c[0]), i) for i, (c, e) in enumerate(zip(costs, errors, strict=True))
    )
    left, greedy = budget - sum(c[0] for c in costs), sum(e[0] for e in errors)
    for _, i in reversed(gains):
        if costs[i][1] - costs[i][0] <= left:
            left -= costs[i][1] - costs[i][0]
            greedy -= errors[i][0] - errors[i][1]
    assert total <= greedy + 1e-9
