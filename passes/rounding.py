"""Learned rounding: offsets and scales of a block's linears, trained together from a closed-form start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..runtime.quantize import qmax, round_scale

TRAVEL = 0.4
"""How far an offset can move in a whole training, in integer steps, however many iterations that takes."""
STRETCH = 0.02
"""How far a scale can move, as a share of itself."""
MOMENTUM = 0.8
DAMPING = 0.5
"""Added to the diagonal of the input's second moment, as a share of its mean, before it is inverted."""
JUDGEMENTS = 5
"""How many times in a training the state is judged on the held-out microbatches."""


@torch.no_grad()
def preconditioner(hessian: Tensor) -> Tensor:
    """``(H / mean diag H + DAMPING I)^-1``, [in, in] float32, of the second moment H of a linear's input.

    A gradient of a weight is large along the directions in which its inputs are. Multiplied by this it asks
    for the change of the weight that reduces the loss, not for the one that changes the output most; without
    it the first steps undo the cancellation of errors that GPTQ made, and a short training ends worse than it
    began. Linears that read one value share it. A channel that is never active is only damped.

    Source: the input factor of K-FAC (arXiv 1503.05671).
    """
    mean = hessian.diagonal().mean()
    damped = (hessian / mean if mean > 0 else hessian).double()
    damped.diagonal().add_(DAMPING)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).float()


@dataclass(eq=False)
class Rounding:
    """One linear in training: ``q = clamp(round(w / s0 + v))``, dequantized with ``s = s0 m``.

    The start is v = 0, m = 1: what the closed-form rounding gave. Integers do not follow the scale, so that v
    and m are moved independently.
    """

    weight: Tensor
    """[out, in] float32: what the start rounded, with GPTQ's compensation in it."""
    scale: Tensor
    """[out, groups] float32, the start's."""
    bits: int
    scale_dtype: torch.dtype
    """The dtype in which the server holds scales."""
    curvature: Tensor | None = None
    """The :func:`preconditioner` of the input, [in, in]; None takes the plain gradient."""
    offset: Tensor = field(init=False)
    """v, [out, in] float32."""
    stretch: Tensor = field(init=False)
    """m, [out, groups] float32."""

    def __post_init__(self) -> None:
        width, groups = self.weight.shape[1], self.scale.shape[1]
        if width % groups:
            raise ValueError(f"{groups} groups do not divide {width} input channels")
        self.start = self.weight / self.wide(self.scale)
        self.offset = torch.zeros_like(self.weight, requires_grad=True)
        self.stretch = torch.ones_like(self.scale, requires_grad=True)
        self.momentum: Tensor | None = None

    def wide(self, scale: Tensor) -> Tensor:
        """A scale of [out, groups] as [out, in], or as [out, 1] where it broadcasts."""
        groups = scale.shape[1]
        return scale if groups == 1 else scale.repeat_interleave(self.weight.shape[1] // groups, dim=1)

    def current_scale(self) -> Tensor:
        """[out, groups] as the server will hold it, with a straight-through gradient."""
        exact = self.scale * self.stretch
        return exact + (round_scale(exact.detach(), self.scale_dtype) - exact).detach()

    def integers(self) -> Tensor:
        """[out, in] float32 integers in the signed range of ``bits``, with a straight-through gradient."""
        exact = self.start + self.offset
        high = qmax(self.bits)
        return exact + (exact.round().clamp(-high - 1, high) - exact).detach()

    def fake(self) -> Tensor:
        """The quantized weight, [out, in] float32, differentiable in offset and stretch."""
        return self.integers() * self.wide(self.current_scale())

    def state(self) -> tuple[Tensor, Tensor]:
        """A copy of what is trained."""
        return self.offset.detach().clone(), self.stretch.detach().clone()

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Put a copied state back."""
        with torch.no_grad():
            self.offset.copy_(state[0])
            self.stretch.copy_(state[1])

    @torch.no_grad()
    def move_offset(self, gradient: Tensor, rate: float) -> None:
        """A step of at most ``rate`` per offset, against the smoothed and preconditioned gradient.

        ``d = momentum(dL/dw) P / s``, in integer steps; the step is ``rate clamp(d / rms_row(d), -1, 1)``: a
        sign where the gradient is clear, less where it is noise.
        """
        wide = self.wide(self.scale)
        slope = gradient / wide  # of the weight, from that of its offset
        smooth = slope if self.momentum is None else self.momentum.lerp(slope, 1 - MOMENTUM)
        self.momentum = smooth
        step = (smooth if self.curvature is None else smooth @ self.curvature) / wide
        size = step.square().mean(1, keepdim=True).sqrt()
        step = torch.where(size > 0, step / size, 0.0).clamp_(-1, 1)
        self.offset.sub_(step, alpha=rate)

    @torch.no_grad()
    def move_stretch(self, gradient: Tensor, rate: float) -> None:
        """A sign step of ``rate`` on the scales."""
        self.stretch.sub_(gradient.sign(), alpha=rate)


Loss = Callable[[int], Tensor]
"""The loss on microbatch i, with all linears of the block on their grids."""


def train(
    roundings: Mapping[str, Rounding], loss: Loss, training: Sequence[int], held_out: Sequence[int], *,
    iters: int, round_tuning: bool, scale_tuning: bool, generator: torch.Generator,
    report: Callable[[str], None] = lambda text: None,
) -> tuple[float, float]:  # fmt: skip
    """Train in place and keep the state with the least loss on the held-out microbatches, the start included.

    Each iteration draws one microbatch, in an order that ``generator`` shuffles anew for every epoch. Steps
    decay linearly to zero and add up to ``TRAVEL`` (``STRETCH`` for scales) whatever ``iters`` is: a few of them
    take no wild steps. A loss that is not finite never becomes the best.

    Returns the held-out loss of the start and of what was kept.

    Source: AutoRound (arXiv 2309.05516), section 3, with the step of :meth:`Rounding.move_offset`.
    """
    if iters < 0 or not held_out or (iters and not training):
        raise ValueError("training needs iters >= 0 and microbatches both to train and to judge on")
    offsets = list(roundings.values()) if round_tuning else []
    stretches = list(roundings.values()) if scale_tuning else []
    leaves = [r.offset for r in offsets] + [r.stretch for r in stretches]

    def judged() -> float:
        with torch.no_grad():
            return sum(float(loss(index)) for index in held_out) / len(held_out)

    start = best = judged()
    if not leaves or not iters:
        return start, best
    states = {name: r.state() for name, r in roundings.items()}
    every = max(1, iters // JUDGEMENTS)
    order: list[int] = []
    for step in range(iters):
        if not order:
            order = [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
        gradients = torch.autograd.grad(loss(order.pop()), leaves, allow_unused=True)
        share = 2 * (iters - step) / (iters * (iters + 1))  # falls linearly, sums to one
        for rounding, gradient in zip(offsets, gradients[: len(offsets)], strict=True):
            if gradient is not None:
                rounding.move_offset(gradient, TRAVEL * share)
        for rounding, gradient in zip(stretches, gradients[len(offsets) :], strict=True):
            if gradient is not None:
                rounding.move_stretch(gradient, STRETCH * share)
        if (step + 1) % every == 0 or step + 1 == iters:
            now = judged()
            report(f"{step + 1}/{iters} loss {now:.3g}, start {start:.3g}")
            if now < best:
                best, states = now, {name: r.state() for name, r in roundings.items()}
    for name, rounding in roundings.items():
        rounding.restore(states[name])
    return start, best
