"""Statistics of what linears read: whole, sampled, joined, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc.compiler.errors import Failed
from qc.compiler.observe import Observers
from qc.compiler.operand import Statistic
from qc.compiler.scheme import Int, LinearScheme
from qc.compiler.statistics import BINS, KINDS, ROWS, Histogram, Sample
from qc.passes.act_range import act_scale, clipped_range, input_range
from qc.passes.ssz import ssz_scale
from qc.passes.weight_scale import weight_scale
from qc.runtime.quantize import dequantize, quantize


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EXACT = {
    "absmax": lambda x: x.abs().amax(0),
    "range": lambda x: torch.stack([x.amin(0), x.amax(0)]),
    "absmean": lambda x: x.abs().mean(0),
    "meansquare": lambda x: x.square().mean(0),
}


@given(
    st.integers(0, 99), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from(sorted(EXACT))
)
def test_batches_do_not_matter(seed: int, sizes: list[int], kind: str) -> None:
    x = randn(sum(sizes), 6, seed=seed) * 10
    one = KINDS[kind]()
    for part in x.split(sizes):
        one.add(part)
    torch.testing.assert_close(one.value, EXACT[kind](x))
    halves = [KINDS[kind](), KINDS[kind]()]
    for number, part in enumerate(x.split(sizes)):
        halves[number % 2].add(part)
    whole = KINDS[kind]()
    for half, used in zip(halves, (True, len(sizes) > 1), strict=True):
        if used:
            whole.join(half)
    torch.testing.assert_close(whole.value, EXACT[kind](x))


@given(st.integers(0, 99), st.lists(st.integers(1, 400), min_size=1, max_size=6))
def test_a_sample_is_rows_that_came_and_is_the_same_again(seed: int, sizes: list[int]) -> None:
    x = randn(sum(sizes), 3, seed=seed)
    first, second = Sample(), Sample()
    for part in x.split(sizes):
        first.add(part)
        second.add(part)
    assert torch.equal(first.value, second.value)
    assert len(first.value) == min(ROWS, len(x))
    came = {tuple(row) for row in x.tolist()}
    found = [tuple(row) for row in first.value.tolist()]
    assert set(found) <= came
    assert len(set(found)) == len(found)


@given(st.integers(0, 99), st.floats(1e-3, 1e3), st.integers(1, 4))
def test_a_histogram_counts_every_value_near_where_it_is(seed: int, size: float, parts: int) -> None:
    x = randn(64, 8, seed=seed)
    x[32:] *= size  # the range may grow by much between batches
    one = Histogram()
    for part in x.chunk(parts):
        one.add(part)
    counts, middles = one.value
    assert int(counts.sum()) == x.numel()
    assert middles[0] == x.min()
    assert middles[-1] == x.max()
    width = 2.0**one.exponent if one.exponent is not None else 0.0
    assert width <= 4 * float(x.abs().max()) / BINS
    cut = float(middles[len(middles) // 2]) + width / 2
    below = int(counts[: len(middles) // 2 + 1].sum())
    assert abs(below - int((x < cut).sum())) <= int(((x - cut).abs() < width).sum())


def test_joined_histograms_are_the_histogram_of_both() -> None:
    left, right, both = Histogram(), Histogram(), Histogram()
    a, b = randn(50, 4), 100 * randn(50, 4, seed=1)
    left.add(a)
    right.add(b)
    both.add(a)
    both.add(b)
    left.join(right)
    assert torch.equal(left.value, both.value)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_with_its_linear(kind: str, bad: float) -> None:
    observers = Observers([Statistic(kind, "layer.down")])
    x = randn(5, 4)
    x[2, 1] = bad
    observers("layer.down", x, torch.eye(4), None)
    observers("layer.down", randn(5, 4), torch.eye(4), None)
    with pytest.raises(Failed, match=r"layer\.down: its input is not finite"):
        observers.results()


def error(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, bits: int = 8) -> float:
    return float((dequantize(quantize(x, scale, bits, offset), scale, offset) - x).square().mean())


@given(st.integers(0, 99), st.booleans(), st.floats(1, 200))
def test_a_clipped_range_is_no_worse_than_the_whole(seed: int, symmetric: bool, outlier: float) -> None:
    x = randn(64, 16, seed=seed) + 0.5
    x[0, 0] = outlier
    one = Histogram()
    one.add(x)
    act = Int(8, "tensor", symmetric=symmetric)
    scale, offset = clipped_range(one.value, act, torch.float32)
    whole = act_scale(x.min()[None], x.max()[None], act, torch.float32)
    assert error(x, scale, offset) <= error(x, *whole) * 1.02 + 1e-9
    assert bool((offset == 0).all()) or not symmetric


def test_the_tails_of_a_gaussian_are_cut_where_steps_are_coarse() -> None:
    x = randn(4096, 16)
    one = Histogram()
    one.add(x)
    act = Int(4, "tensor", symmetric=False)
    scale, offset = clipped_range(one.value, act, torch.float32)
    whole = input_range(torch.stack([x.amin(0), x.amax(0)]), LinearScheme(act=act), torch.float32)
    assert float(scale) < 0.8 * float(whole[0])
    assert error(x, scale, offset, 4) < 0.7 * error(x, *whole, 4)


@pytest.mark.parametrize("group", [0, 16])
def test_ssz_is_no_worse_than_the_largest_weight(group: int) -> None:
    weight = randn(8, 64)
    weight[0, 0] = 8.0
    format = Int(4, "group", group=group) if group else Int(4, "channel")
    plain, fitted = weight_scale(weight, format, torch.float32), ssz_scale(weight, 4, group, torch.float32)
    assert plain.shape == fitted.shape

    def off(scale: torch.Tensor) -> torch.Tensor:
        wrong = dequantize(quantize(weight, scale, 4), scale) - weight
        return wrong.view(8, scale.shape[1], -1).square().sum(-1)

    assert bool((off(fitted) <= off(plain)).all())
    assert float(off(fitted).sum()) < 0.97 * float(off(plain).sum())
    assert bool((ssz_scale(torch.zeros(2, 8), 4, 0, torch.float32) > 0).all())
