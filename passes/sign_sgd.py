"""Learned rounding: row-normalised steps on rounding offsets and scales of a whole block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.quantize import qmax, round_scale
from .losses import Losses

TINY = torch.finfo(torch.float32).tiny
MOMENTUM = 0.8
TRAVEL = 0.1
"""How far, in integers, an offset can move over `ITERS` steps."""
SCALE_TRAVEL = 0.007
"""How far a scale can move over as many steps, as a share of itself."""
ITERS = 50
"""Steps for which these were measured."""
JUDGED = 5
"""How often the held-out loss is looked at."""


@dataclass
class Rounding:
    """One linear in training: ``q = clamp(round(w / s + v))`` with ``s = s0 · m``.

    ``weight`` [out, in] is what the start rounded (compensated by GPTQ), ``scale`` [out, groups] the start's.
    The start itself is v = 0, m = 1.
    """

    weight: Tensor
    scale: Tensor
    bits: int
    scale_dtype: torch.dtype
    per_tensor: bool = False
    """Whether all rows have one scale, and keep it."""
    zero: Tensor | None = None
    """Offsets of the shape of ``scale``, which stay; None where the format is symmetric."""

    def __post_init__(self) -> None:
        self.offset = torch.zeros_like(self.weight).requires_grad_()
        stretch = self.scale[:1, :1] if self.per_tensor else self.scale
        self.stretch = torch.ones_like(stretch).requires_grad_()

    @torch.no_grad()
    def current_scale(self) -> Tensor:
        """[out, groups] as the server will hold it."""
        return round_scale(self.scale * self.stretch, self.scale_dtype)

    def fake(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The quantized weight [out, in], differentiable; rounding passes gradients straight through."""
        return _Fake.apply(self.offset, self.stretch, self, dtype)  # type: ignore[return-value]

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Tensor]:
        """Integers, int8 [out, in], and scales, float32 [out, groups], of the present state."""
        scale = self.current_scale()
        high = qmax(self.bits)
        integers, _ = _rounded(self, scale)
        return integers.clamp_(-high - 1, high).flatten(1).to(torch.int8), scale

    def state(self) -> tuple[Tensor, Tensor]:
        """A copy of what is trained."""
        return self.offset.detach().clone(), self.stretch.detach().clone()

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Put a copied state back."""
        with torch.no_grad():
            self.offset.copy_(state[0])
            self.stretch.copy_(state[1])


def _rounded(rounding: Rounding, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``round(w / s + v)`` before it is cut to the range of the integers, and ``w / s``: [out, groups, width]."""
    scaled = rounding.weight.view(*scale.shape, -1) / scale[..., None]
    integers = scaled + rounding.offset.view_as(scaled)
    if rounding.zero is not None:
        integers += rounding.zero[..., None]
    return integers.round_(), scaled


class _Fake(torch.autograd.Function):
    """``clamp(round(w / s + v)) s`` with the gradients that autograd has of it, in fewer passes over the weight.

    Of v: ``g s`` where nothing is cut off. Of s: ``g (q - w / s)`` there, ``g q`` elsewhere, summed over a group.
    """

    @staticmethod
    def forward(ctx: Any, offset: Tensor, stretch: Tensor, rounding: Rounding, dtype: torch.dtype) -> Tensor:
        scale = rounding.current_scale()
        high = qmax(rounding.bits)
        rounded, slope = _rounded(rounding, scale)
        integers = rounded.clamp(-high - 1, high)
        inside = integers == rounded
        if rounding.zero is not None:
            integers -= rounding.zero[..., None]
        torch.where(inside, integers - slope, integers, out=slope)
        ctx.save_for_backward(scale, inside, slope)
        ctx.rounding, ctx.sizes = rounding, stretch.shape
        return integers.mul_(scale[..., None]).flatten(1).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, inside, slope = ctx.saved_tensors
        grad = grads[0].float().view_as(slope)
        stretch = (grad * slope).sum(-1).mul_(ctx.rounding.scale).sum_to_size(ctx.sizes)
        return (grad * scale[..., None]).mul_(inside).flatten(1), stretch, None, None


@dataclass
class _Mover:
    """One tensor in training: its momentum, and how a step of it is made of a gradient."""

    tensor: Tensor
    direction: Callable[[Tensor], Tensor]
    travel: float
    low: float
    high: float

    def __post_init__(self) -> None:
        self.momentum = torch.zeros_like(self.tensor)

    @torch.no_grad()
    def step(self, grad: Tensor, rate: float) -> None:
        """Move by at most ``rate · travel``."""
        torch.add(grad, self.momentum, alpha=MOMENTUM, out=self.momentum)
        self.tensor.sub_(self.direction(self.momentum), alpha=rate * self.travel).clamp_(self.low, self.high)


def _movers(rounding: Rounding, *, round_tuning: bool, scale_tuning: bool) -> list[_Mover]:
    def rows(momentum: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(momentum, dim=1, keepdim=True)
        return momentum.div(length.div_(momentum.shape[1] ** 0.5).clamp_(min=TINY)).clamp_(-1, 1)

    found = []
    if round_tuning:
        found.append(_Mover(rounding.offset, rows, TRAVEL, -0.5, 0.5))
    if scale_tuning:
        found.append(_Mover(rounding.stretch, torch.sign, SCALE_TRAVEL, 0.5, 1.5))
    return found


def travel(iters: int) -> float:
    """How far ``iters`` steps may go in all, 1 at `ITERS`.

    The noise of gradients adds up like a random walk: four times as many steps carry it as far when the whole way is
    twice as long.
    """
    return (iters / ITERS) ** 0.5


Loss = Callable[[int], Tensor]
"""The loss on microbatch i, with all linears of the block on their grids."""


def train(
    roundings: Mapping[str, Rounding], loss: Loss, training: Sequence[int], held_out: Sequence[int], *,
    iters: int, round_tuning: bool, scale_tuning: bool, generator: torch.Generator,
    report: Callable[[str], None] = lambda text: None,
) -> Losses:  # fmt: skip
    """Train in place and keep the state with the least loss on the held-out microbatches, the start included.

    A step is the gradient's momentum, divided by the root mean square of its row and cut to [-1, 1]; its rate falls
    linearly to zero, and is such that an offset moves by `travel` of ``iters`` times ``TRAVEL`` integers at most.

    Source: SignRound / AutoRound (arXiv 2309.05516), section 3, for the objective; the sign is softened and goes a
    fifth as far, because the start is the answer of GPTQ and most of a gradient is noise.
    """
    movers = [
        mover for rounding in roundings.values()
        for mover in _movers(rounding, round_tuning=round_tuning, scale_tuning=scale_tuning)
    ]  # fmt: skip

    @torch.no_grad()
    def judged() -> float:
        return sum(float(loss(index)) for index in held_out) / len(held_out)

    losses = Losses([(0, judged())])
    if not movers or not iters:
        return losses
    states = {name: r.state() for name, r in roundings.items()}
    every = max(1, iters // JUDGED)
    order: list[int] = []
    for step in range(iters):
        if not order:
            order = [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
        found = loss(order.pop())
        losses.training.append(float(found.detach()))
        grads = torch.autograd.grad(found, [mover.tensor for mover in movers])
        for mover, grad in zip(movers, grads, strict=True):
            mover.step(grad, 2 * travel(iters) / iters * (1 - step / iters))
        if (step + 1) % every == 0 or step + 1 == iters:
            now = judged()
            report(f"{step + 1}/{iters} loss {now:.4g}, start {losses.start:.4g}")
            if now < losses.best:
                states = {name: r.state() for name, r in roundings.items()}
            losses.held_out.append((step + 1, now))
    for name, rounding in roundings.items():
        rounding.restore(states[name])
    return losses
