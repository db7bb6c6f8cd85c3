"""Laws of rounding: scale search, GPTQ, and the training of offsets and scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qc.passes.gptq import gptq
from qc.passes.rounding import Rounding, preconditioner, train
from qc.passes.scale_search import search_scale
from qc.runtime.quantize import qmax

FLOAT, BF16 = torch.float32, torch.bfloat16


def layer(seed: int = 0, out: int = 24, width: int = 32, rows: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs with a few loud channels, and their second moment."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=g) / width**0.5 + torch.eye(width)
    x = torch.randn(rows, width, generator=g) @ mixing
    x[:, :3] *= 8
    return torch.randn(out, width, generator=g), x, x.T @ x / rows


def output_error(weight: Tensor, dense: Tensor, x: Tensor) -> float:
    return float(((weight - dense) @ x.T).square().mean())


def wide(scale: Tensor, width: int) -> Tensor:
    return scale.repeat_interleave(width // scale.shape[1], dim=1)


def nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    steps = wide(scale, weight.shape[1])
    return (weight / steps).round().clamp(-qmax(bits) - 1, qmax(bits)) * steps


def block(seed: int = 0, group: int = 0, curved: bool = True):
    """A two-linear block in training: its roundings, its loss on a microbatch, and the float32 start."""
    g = torch.Generator().manual_seed(seed)
    first, x, hessian = layer(seed, out=40, rows=6 * 64)
    second = torch.randn(32, 40, generator=g)
    batches = x.split(64)
    targets = [torch.relu(b @ first.T) @ second.T for b in batches]
    inner = torch.cat([torch.relu(b @ first.T) for b in batches])
    inner_hessian = inner.T @ inner / len(inner)
    roundings = {}
    for name, weight, moment in (("first", first, hessian), ("second", second, inner_hessian)):
        scale = search_scale(weight, 4, group if name == "first" else 0, FLOAT, moment.diagonal())
        _, compensated = gptq(weight, scale, moment, 4)
        roundings[name] = Rounding(compensated, scale, 4, FLOAT, preconditioner(moment) if curved else None)

    def loss(index: int) -> Tensor:
        hidden = torch.relu(batches[index] @ roundings["first"].fake().T)
        return (hidden @ roundings["second"].fake().T - targets[index]).square().mean()

    return roundings, loss


def fit(roundings, loss, iters: int, seed: int = 0, **options) -> tuple[float, float]:
    options = {"round_tuning": True, "scale_tuning": True} | options
    return train(
        roundings, loss, [0, 1, 2, 3], [4, 5], iters=iters,
        generator=torch.Generator().manual_seed(seed), **options,
    )  # fmt: skip


def held_out(loss) -> float:
    with torch.no_grad():
        return float(loss(4) + loss(5)) / 2


def test_published_row_of_integers():
    row = torch.tensor([[0.7, -1.4, 0.2, 1.05]])
    scale = torch.tensor([[1.4 / 7]]).to(BF16).float()
    assert scale.item() == 0.2001953125
    rounding = Rounding(row, scale, 4, BF16)
    assert rounding.integers().tolist() == [[3, -7, 1, 5]]
    with torch.no_grad():
        rounding.offset.fill_(0.1)
    assert rounding.integers().tolist() == [[4, -7, 1, 5]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), bits=st.sampled_from([3, 4, 8]), group=st.sampled_from([0, 8, 16]))
def test_searched_scale_is_never_worse_than_the_range(seed: int, bits: int, group: int):
    weight, _, hessian = layer(seed)
    importance = hessian.diagonal()
    found = search_scale(weight, bits, group, BF16, importance)
    rows = weight.view(24, -1, group or 32)
    plain = (rows.abs().amax(-1) / qmax(bits)).to(BF16).float()
    assert found.shape == plain.shape
    assert torch.equal(found, found.to(BF16).float())
    error = [
        ((nearest(weight, scale, bits) - weight).square() * importance).sum(1) for scale in (found, plain)
    ]
    assert (error[0] <= error[1] * (1 + 1e-5)).all()


def test_searched_scale_clips_an_outlier_that_does_not_matter():
    weight = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([4.0])])[None]
    importance = torch.ones(32)
    importance[-1] = 1e-6
    assert search_scale(weight, 4, 0, FLOAT, importance) < 0.7 * search_scale(weight, 4, 0, FLOAT)


@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_beats_the_nearest_integer_on_the_output(bits: int, group: int):
    weight, x, hessian = layer()
    scale = search_scale(weight, bits, group, FLOAT, hessian.diagonal())
    integers, _ = gptq(weight, scale, hessian, bits)
    assert integers.min() >= -qmax(bits) - 1
    assert integers.max() <= qmax(bits)
    dense = integers * wide(scale, 32)
    assert output_error(weight, dense, x) < 0.8 * output_error(weight, nearest(weight, scale, bits), x)


def test_gptq_on_independent_inputs_is_the_nearest_integer():
    weight, _, _ = layer()
    scale = search_scale(weight, 4, 0, FLOAT)
    integers, compensated = gptq(weight, scale, torch.eye(32), 4)
    assert torch.equal(integers * scale, nearest(weight, scale, 4))
    assert torch.allclose(compensated, weight)


def test_gptq_survives_inputs_that_were_never_active():
    weight, _, hessian = layer()
    hessian[5], hessian[:, 5] = 0, 0
    scale = search_scale(weight, 4, 0, FLOAT)
    for moment in (hessian, torch.zeros_like(hessian)):
        integers, _ = gptq(weight, scale, moment, 4)
        assert integers.isfinite().all()
        assert torch.equal((integers * scale)[:, 5], nearest(weight, scale, 4)[:, 5])


@pytest.mark.parametrize("group", [0, 8])
def test_the_start_is_what_gptq_rounded(group: int):
    weight, _, hessian = layer()
    scale = search_scale(weight, 4, group, BF16, hessian.diagonal())
    integers, compensated = gptq(weight, scale, hessian, 4)
    rounding = Rounding(compensated, scale, 4, BF16)
    assert torch.equal(rounding.integers(), integers)
    assert torch.equal(rounding.fake(), integers * wide(scale, 32))


@pytest.mark.parametrize("curved", [True, False])
@pytest.mark.parametrize("iters", [0, 1, 2, 10])
def test_training_never_ends_worse_than_its_start(iters: int, curved: bool):
    roundings, loss = block(curved=curved)
    before = held_out(loss)
    start, best = fit(roundings, loss, iters)
    assert start == before
    assert held_out(loss) == best
    assert best <= start


@pytest.mark.parametrize("group", [0, 8])
def test_training_reduces_the_held_out_loss(group: int):
    roundings, loss = block(group=group)
    start, best = fit(roundings, loss, 40)
    assert best < 0.9 * start
    for rounding in roundings.values():
        integers = rounding.integers().detach()
        assert torch.equal(integers, integers.round())
        assert integers.abs().max() <= 8


def test_training_is_a_function_of_its_generator_alone():
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))
        torch.rand(len(results) + 1)
        roundings, loss = block()
        fit(roundings, loss, 12, seed)
        results.append(torch.cat([r.fake().detach().flatten() for r in roundings.values()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_training_leaves_the_global_generator_alone():
    roundings, loss = block()
    before = torch.get_rng_state()
    fit(roundings, loss, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_tuning_can_be_switched_off():
    for what, still in (("round_tuning", "offset"), ("scale_tuning", "stretch")):
        roundings, loss = block()
        starts = {name: getattr(r, still).detach().clone() for name, r in roundings.items()}
        fit(roundings, loss, 10, **{what: False})
        assert all(torch.equal(getattr(r, still), starts[name]) for name, r in roundings.items())
    roundings, loss = block()
    start, best = fit(roundings, loss, 10, round_tuning=False, scale_tuning=False)
    assert start == best


def test_scales_stay_on_the_servers_dtype():
    weight, _, hessian = layer()
    scale = search_scale(weight, 4, 8, BF16)
    rounding = Rounding(weight, scale, 4, BF16, preconditioner(hessian))
    with torch.no_grad():
        rounding.stretch.mul_(1.0123)
    held = rounding.current_scale().detach()
    assert torch.equal(held, held.to(BF16).float())
    assert not torch.equal(held, scale)


def test_a_loss_that_is_not_finite_is_not_kept():
    roundings, loss = block()
    calls = iter(range(10**6))

    def breaks(index: int) -> Tensor:
        return loss(index) if next(calls) < 2 else loss(index) * torch.nan

    before = {name: r.fake().detach().clone() for name, r in roundings.items()}
    start, best = fit(roundings, breaks, 5)
    assert start == best
    assert all(torch.equal(r.fake(), before[name]) for name, r in roundings.items())


def test_preconditioner_inverts_the_damped_moment():
    _, _, hessian = layer()
    shaped = hessian / hessian.diagonal().mean() + 0.5 * torch.eye(32)
    assert torch.allclose(preconditioner(hessian) @ shaped, torch.eye(32), atol=1e-4)
    assert torch.allclose(preconditioner(torch.zeros(4, 4)), 2 * torch.eye(4))


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        Rounding(torch.ones(2, 10), torch.ones(2, 3), 4, FLOAT)
