"""What learns integers: GPTQ, scale search, clip search, importance of tokens, training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qc.compiler.view import BlockView, LinearHook
from qc.passes.act_clip import RATIOS, ClipSearch
from qc.passes.column_rounding import gptq
from qc.passes.gram import Gram
from qc.passes.importance import relative_error, token_importance
from qc.passes.scale_search import search_scale
from qc.passes.sign_sgd import TRAVEL, Rounding, train, travel
from qc.runtime.quantize import dequantize, fake_quant_per_token, quantize, round_scale, scale_for


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, seed: int = 0) -> Tensor:
    """Inputs [rows, width] whose channels depend on one another and differ in size."""
    x = random(8 * width, width, seed=seed) @ random(width, width, seed=seed + 1)
    return x * torch.linspace(0.2, 3, width)


def by_hand(weight: Tensor, scale: Tensor, hessian: Tensor, bits: int, damping: float) -> Tensor:
    """One column after another; after each, the open columns of a row are its exact least-squares answer."""
    h = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    scales = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    found, wanted = weight.double().clone(), weight.double()
    high = 2 ** (bits - 1) - 1
    integers = torch.zeros_like(found)
    for at, column in enumerate(order):
        integers[:, column] = (found[:, column] / scales[:, column]).round().clamp(-high - 1, high)
        found[:, column] = integers[:, column] * scales[:, column]
        done, rest = order[: at + 1], order[at + 1 :]
        if rest:
            error = (found - wanted)[:, done] @ h[done][:, rest]
            found[:, rest] = wanted[:, rest] - torch.linalg.solve(h[rest][:, rest], error.T).T
    return integers


@given(st.integers(0, 50), st.sampled_from([(4, 8, 8), (3, 40, 40), (2, 72, 24)]), st.sampled_from([3, 4]))
def test_gptq_is_the_greedy_least_squares_answer(seed: int, size: tuple[int, int, int], bits: int) -> None:
    out, width, group = size
    weight, x = random(out, width, seed=seed), correlated(width, seed)
    scale = scale_for(weight.view(out, -1, group).abs().amax(-1) * 0.9, bits)
    hessian = x.T @ x / len(x)
    got, compensated = gptq(weight, scale, hessian, bits)
    want = by_hand(weight, scale, hessian, bits, 0.01)
    assert (got != want).float().mean() <= 0.01  # a tie may fall to either side in float32
    assert torch.equal(quantize(compensated, scale, bits).float(), got)


def test_gptq_beats_rounding_to_nearest_where_inputs_are_correlated() -> None:
    weight, x = random(16, 96), correlated(96)
    scale = scale_for(weight.abs().amax(1, keepdim=True), 4)
    integers, _ = gptq(weight, scale, x.T @ x / len(x), 4)
    nearest = quantize(weight, scale, 4)
    errors = [float((x @ (dequantize(q, scale) - weight).T).square().mean()) for q in (integers, nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_gptq_survives_channels_that_are_never_active() -> None:
    weight, x = random(4, 16), correlated(16)
    x[:, ::2] = 0
    scale = scale_for(weight.abs().amax(1, keepdim=True), 4)
    integers, _ = gptq(weight, scale, x.T @ x / len(x), 4)
    assert torch.equal(integers[:, ::2], quantize(weight, scale, 4)[:, ::2].float())
    assert torch.equal(gptq(weight, scale, torch.zeros(16, 16), 4)[0], quantize(weight, scale, 4).float())


@given(st.integers(0, 20), st.sampled_from([0, 16]), st.booleans())
def test_a_searched_scale_is_no_worse_than_the_whole_range(seed: int, group: int, weighed: bool) -> None:
    weight = random(6, 64, seed=seed) ** 3
    importance = random(64, seed=seed + 1).square() if weighed else None
    found = search_scale(weight, 4, group, torch.bfloat16, importance)
    assert torch.equal(found, round_scale(found, torch.bfloat16))
    width = group or 64
    whole = round_scale(scale_for(weight.view(6, -1, width).abs().amax(-1), 4), torch.bfloat16)

    def error(scale: Tensor) -> Tensor:
        squares = (dequantize(quantize(weight, scale, 4), scale) - weight).square()
        return (squares * (1 if importance is None else importance)).view(6, -1, width).sum(-1)

    assert (error(found) <= error(whole) * (1 + 1e-5)).all()
    assert error(found).sum() < error(whole).sum()


@pytest.mark.parametrize(
    ("channels", "least", "most"),
    [(lambda: random(256, 512), 0.5, 0.9), (lambda: random(256, 512).sign(), 1.0, 1.0)],
    ids=["gaussian", "two-valued"],
)
def test_rows_with_tails_are_clipped_and_others_are_not(
    channels: Callable[[], Tensor], least: float, most: float
) -> None:
    x = channels()
    search = ClipSearch([random(32, 512)], lambda rows, ratio: fake_quant_per_token(rows, 4, ratio))
    for rows in x.split(64):
        search.add(rows, torch.ones(len(rows)))
    assert least <= search.best <= most
    errors = [float((fake_quant_per_token(x, 4, ratio) - x).square().mean()) for ratio in RATIOS]
    assert abs(search.best - RATIOS[errors.index(min(errors))]) <= 0.051


def view_of(x: Tensor, weight: Tensor, target: Tensor) -> BlockView:
    """A block that is one linear called ``l`` and its residual."""
    view = BlockView("block", {}, {}, torch.bfloat16, 0)

    def forward(hook: LinearHook, index: int) -> Tensor:
        return x[index] + hook("l", x[index], weight, None)

    view.batches, view.forward, view.target = len(x), forward, lambda index: target[index]
    return view


def test_tokens_of_huge_outputs_weigh_little() -> None:
    x, weight = random(2, 3, 40, 64), random(64, 64, seed=1)
    x[:, :, 0] *= 100
    target = x
    found = token_importance(view_of(x, weight, target), {"l"}, "block")
    weights = torch.stack([batch["l"] for batch in found]).view(2, 3, 40)
    assert float(weights.mean()) == pytest.approx(1, rel=1e-5)
    share = weights[..., 0].mean() / weights[..., 1:].mean()
    assert float(share) == pytest.approx(1e-4, rel=0.3)
    again = token_importance(view_of(x, weight, target), {"l"}, "block")
    assert all(torch.equal(a["l"], b["l"]) for a, b in zip(found, again, strict=True))


def test_importance_predicts_the_error_of_the_block() -> None:
    """Noise on the output of a linear that a nonlinearity follows moves the relative error as the weights say."""
    x, weight, outer = random(1, 200, 48), random(48, 48, seed=1), random(48, 48, seed=2)
    x[0, :100] *= 5  # tanh is flat for these tokens

    def forward(hook: LinearHook, index: int) -> Tensor:
        return torch.tanh(hook("l", x[index], weight, None)) @ outer

    view = BlockView("block", {}, {}, torch.bfloat16, 0)
    view.batches, view.forward = 1, forward
    clean = forward(lambda name, x, weight, bias: x @ weight.T, 0)
    view.target = lambda index: clean
    weights = token_importance(view, {"l"}, "block")[0]["l"]
    noise = 1e-3 * random(200, 48, seed=3)
    moved = forward(lambda name, x, weight, bias: x @ weight.T + noise, 0)
    error = (moved - clean).square().sum(-1) / clean.square().mean(-1)
    want, got = (float(t[:100].mean() / t[100:].mean()) for t in (error, weights))
    assert want < 0.5
    assert got == pytest.approx(want, rel=0.3)


def test_the_relative_error_counts_every_token_alike() -> None:
    want = random(1, 2, 8)
    want[0, 0] *= 1e4
    assert float(relative_error(want * 1.1, want)) == pytest.approx(0.01, rel=1e-3)
    assert float(relative_error(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))) == 0


@pytest.mark.parametrize(
    ("groups", "per_tensor", "zeros"), [(1, True, False), (1, False, True), (4, False, False)]
)
def test_gradients_of_a_quantized_weight_are_those_of_its_definition(
    groups: int, per_tensor: bool, zeros: bool
) -> None:
    weight, start = random(6, 16), 0.3 * torch.ones(6, groups)  # many weights are cut off
    zero = random(6, groups, seed=1).round() if zeros else None
    rounding = Rounding(weight, start, 4, torch.bfloat16, per_tensor, zero)
    with torch.no_grad():
        rounding.offset.copy_(random(6, 16, seed=2).clamp(-0.5, 0.5))
        rounding.stretch.add_(0.1 * random(*rounding.stretch.shape, seed=3))

    def straight(x: Tensor, to: Tensor) -> Tensor:
        return x + (to - x).detach()

    exact = start * rounding.stretch
    scale = straight(exact, round_scale(exact, torch.bfloat16)).repeat_interleave(16 // groups, 1)
    x = weight / scale + rounding.offset
    wide = torch.zeros(6, 16) if zero is None else zero.repeat_interleave(16 // groups, 1)
    want = (straight(x + wide, (x + wide).round()).clamp(-8, 7) - wide) * scale
    got, probe = rounding.fake(), random(6, 16, seed=4)
    torch.testing.assert_close(got, want)
    inputs = [rounding.offset, rounding.stretch]
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, probe), torch.autograd.grad(want, inputs, probe)
    )


@given(st.integers(1, 300), st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_a_gram_matrix_is_the_mean_of_its_products(width: int, batches: list[int]) -> None:
    rows, gram = random(sum(batches), width, seed=width), Gram()
    for batch in rows.split(batches):
        gram.add(batch)
    torch.testing.assert_close(gram.mean, rows.T @ rows / max(len(rows), 1))


def problem() -> tuple[Rounding, Callable[[int], Tensor], Tensor]:
    """One linear on correlated inputs, started from rounding to nearest; the loss on one of four microbatches."""
    weight, x = random(24, 64), random(2048, 64) @ (torch.eye(64) + random(64, 64, seed=5) / 4)
    scale = scale_for(0.8 * weight.abs().amax(1, keepdim=True), 4)
    rounding = Rounding(weight, scale, 4, torch.float32)
    batches = x.split(len(x) // 4)

    def loss(index: int) -> Tensor:
        return (batches[index] @ (rounding.fake() - weight).T).square().mean()

    return rounding, loss, scale


def trained(
    iters: int, *, round_tuning: bool = True, scale_tuning: bool = True
) -> tuple[float, float, Rounding]:
    rounding, loss, _ = problem()
    losses = train(
        {"l": rounding}, loss, [0, 1, 2], [3], iters=iters, round_tuning=round_tuning,
        scale_tuning=scale_tuning, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert float(loss(3).detach()) == pytest.approx(losses.best, rel=1e-5), (
        "the state that is kept is the one of least loss"
    )
    assert len(losses.training) == (iters if round_tuning or scale_tuning else 0)
    return losses.start, losses.best, rounding


@pytest.mark.parametrize(("iters", "share"), [(10, 0.9), (50, 0.85)])
def test_few_steps_help_and_more_help_more(iters: int, share: float) -> None:
    start, best, _ = trained(iters)
    assert best < share * start


def test_training_repeats_itself_and_moves_no_further_than_it_may() -> None:
    (_, _, one), (_, _, two) = trained(20), trained(20)
    assert all(torch.equal(a, b) for a, b in zip(one.result(), two.result(), strict=True))
    assert 0 < float(one.offset.detach().abs().max()) <= TRAVEL * travel(20) * (1 + 1 / 20) + 1e-6


def test_what_is_not_tuned_stays() -> None:
    scale = problem()[2]
    _, _, fixed = trained(10, scale_tuning=False)
    assert torch.equal(fixed.result()[1], scale)
    _, _, still = trained(10, round_tuning=False)
    assert not still.offset.any()
    start, best, rounding = trained(10, round_tuning=False, scale_tuning=False)
    assert start == best
    assert torch.equal(rounding.result()[0], quantize(rounding.weight, scale, 4))


def test_a_training_that_only_hurts_keeps_its_start() -> None:
    rounding, loss, scale = problem()
    losses = train(
        {"l": rounding}, lambda index: loss(index) * (1 if index == 3 else -1), [0, 1, 2], [3], iters=10,
        round_tuning=True, scale_tuning=True, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert losses.best == losses.start
    integers, kept = rounding.result()
    assert torch.equal(integers, quantize(rounding.weight, scale, 4))
    assert torch.equal(kept, scale)
