"""Learned rounding: preconditioned, row-normalised SignSGD on rounding offsets and scales of a whole block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.device import doubled
from ..runtime.quantize import qmax, round_scale
from .losses import Losses

MOMENTUM = 0.8
DAMPING = 0.5
"""Added to the Hessian of a linear, as a share of the mean of its diagonal."""
TRAVEL = 0.3
"""How far, in integers, an offset can move over a whole training."""
SCALE_TRAVEL = 0.02
"""How far a scale can move, as a share of itself."""
JUDGED = 5
"""How often the held-out loss is looked at."""


def preconditioner(hessian: Tensor) -> Tensor:
    """``(H / mean diag(H) + DAMPING · I)⁻¹`` [in, in], float32, from the Hessian of a linear's inputs [in, in]."""
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    matrix = doubled(hessian / mean)
    matrix.diagonal().add_(DAMPING)
    matrix = torch.linalg.cholesky(matrix)
    return torch.cholesky_inverse(matrix).to(hessian)


@dataclass
class Rounding:
    """One linear in training: ``q = clamp(round(w / s + v))`` with ``s = s0 · m``.

    ``weight`` [out, in] is what the start rounded (compensated by GPTQ), ``scale`` [out, groups] the start's,
    ``steps`` [in, in] the preconditioner of its gradients. The start itself is v = 0, m = 1.
    """

    weight: Tensor
    scale: Tensor
    bits: int
    scale_dtype: torch.dtype
    steps: Tensor
    per_tensor: bool = False
    """Whether all rows have one scale, and keep it."""
    zero: Tensor | None = None
    """Offsets of the shape of ``scale``, which stay; None where the format is symmetric."""

    def __post_init__(self) -> None:
        self.offset = torch.zeros_like(self.weight).requires_grad_()
        stretch = self.scale[:1, :1] if self.per_tensor else self.scale
        self.stretch = torch.ones_like(stretch).requires_grad_()

    def current_scale(self) -> Tensor:
        """[out, groups] as the server will hold it, with a straight-through gradient."""
        exact = self.scale * self.stretch
        return exact + (round_scale(exact, self.scale_dtype) - exact).detach()

    def integers(self, scale: Tensor) -> Tensor:
        """[out, in] float32 integers, with a straight-through gradient of the rounding."""
        high = qmax(self.bits)
        wide = scale.repeat_interleave(self.weight.shape[1] // scale.shape[1], dim=1)
        x = self.weight / wide + self.offset
        if self.zero is not None:
            x = x + self.zero.repeat_interleave(self.weight.shape[1] // self.zero.shape[1], dim=1)
        return (x + (x.round() - x).detach()).clamp(-high - 1, high)

    def fake(self) -> Tensor:
        """The quantized weight in float32, differentiable."""
        scale = self.current_scale()
        wide = scale.repeat_interleave(self.weight.shape[1] // scale.shape[1], dim=1)
        integers = self.integers(scale)
        if self.zero is not None:
            integers = integers - self.zero.repeat_interleave(
                self.weight.shape[1] // self.zero.shape[1], dim=1
            )
        return integers * wide

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Tensor]:
        """Integers, int8 [out, in], and scales, float32 [out, groups], of the present state."""
        scale = self.current_scale()
        return self.integers(scale).to(torch.int8), scale

    def state(self) -> tuple[Tensor, Tensor]:
        """A copy of what is trained."""
        return self.offset.detach().clone(), self.stretch.detach().clone()

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Put a copied state back."""
        with torch.no_grad():
            self.offset.copy_(state[0])
            self.stretch.copy_(state[1])


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
        self.momentum.mul_(MOMENTUM).add_(grad)
        self.tensor.sub_(self.direction(self.momentum), alpha=rate * self.travel).clamp_(self.low, self.high)


def _movers(rounding: Rounding, *, round_tuning: bool, scale_tuning: bool) -> list[_Mover]:
    def rows(momentum: Tensor) -> Tensor:
        moved = momentum @ rounding.steps
        size = moved.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return (moved / size).clamp(-1, 1)

    found = []
    if round_tuning:
        found.append(_Mover(rounding.offset, rows, TRAVEL, -0.5, 0.5))
    if scale_tuning:
        found.append(_Mover(rounding.stretch, torch.sign, SCALE_TRAVEL, 0.5, 1.5))
    return found


Loss = Callable[[int], Tensor]
"""The loss on microbatch i, with all linears of the block on their grids."""


def train(
    roundings: Mapping[str, Rounding], loss: Loss, training: Sequence[int], held_out: Sequence[int], *,
    iters: int, round_tuning: bool, scale_tuning: bool, generator: torch.Generator,
    report: Callable[[str], None] = lambda text: None,
) -> Losses:  # fmt: skip
    """Train in place and keep the state with the least loss on the held-out microbatches, the start included.

    A step is the gradient's momentum times ``(H + λ I)⁻¹``, divided by the root mean square of its row and cut
    to [-1, 1]; its rate falls linearly to zero and is chosen so that ``iters`` steps move an offset by
    ``TRAVEL`` integers at most: few iterations move little per step but as far in all.

    Source: SignRound / AutoRound (arXiv 2309.05516), section 3, for the objective; the sign is softened and
    preconditioned because a plain sign step is worse than a GPTQ start most of the way.
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
            mover.step(grad, 2 / iters * (1 - step / iters))
        if (step + 1) % every == 0 or step + 1 == iters:
            now = judged()
            report(f"{step + 1}/{iters} loss {now:.4g}, start {losses.start:.4g}")
            if now < losses.best:
                states = {name: r.state() for name, r in roundings.items()}
            losses.held_out.append((step + 1, now))
    for name, rounding in roundings.items():
        rounding.restore(states[name])
    return losses
