"""Learned rounding: SignSGD on rounding offsets and scales of all linears of a block at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.quantize import qmax, round_scale


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

    def __post_init__(self) -> None:
        self.offset = torch.zeros_like(self.weight).requires_grad_()
        self.stretch = torch.ones_like(self.scale).requires_grad_()

    def current_scale(self) -> Tensor:
        """[out, groups] as the server will hold it, with a straight-through gradient."""
        exact = self.scale * self.stretch
        return exact + (round_scale(exact, self.scale_dtype) - exact).detach()

    def integers(self, scale: Tensor) -> Tensor:
        """[out, in] float32 integers, with a straight-through gradient of the rounding."""
        high = qmax(self.bits)
        wide = scale.repeat_interleave(self.weight.shape[1] // scale.shape[1], dim=1)
        x = self.weight / wide + self.offset
        return (x + (x.round() - x).detach()).clamp(-high - 1, high)

    def fake(self) -> Tensor:
        """The quantized weight in float32, differentiable."""
        scale = self.current_scale()
        wide = scale.repeat_interleave(self.weight.shape[1] // scale.shape[1], dim=1)
        return self.integers(scale) * wide

    def state(self) -> tuple[Tensor, Tensor]:
        """A copy of what is trained."""
        return self.offset.detach().clone(), self.stretch.detach().clone()

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Put a copied state back."""
        with torch.no_grad():
            self.offset.copy_(state[0])
            self.stretch.copy_(state[1])


Loss = Callable[[int], Tensor]
"""The loss on microbatch i, with all linears of the block on their grids."""


def train(
    roundings: Mapping[str, Rounding], loss: Loss, training: Sequence[int], held_out: Sequence[int], *,
    iters: int, round_tuning: bool, scale_tuning: bool, generator: torch.Generator,
    report: Callable[[str], None] = lambda text: None,
) -> tuple[float, float]:  # fmt: skip
    """Train in place and keep the state with the least loss on the held-out microbatches, the start included.

    The step is ``1 / iters`` of the range of an offset, with linear decay to zero, so that few iterations move
    little and many can reach every neighbour. Returns the held-out loss before and after.

    Source: SignRound / AutoRound (arXiv 2309.05516), section 3.
    """
    parameters = [r.offset for r in roundings.values()] if round_tuning else []
    stretches = [r.stretch for r in roundings.values()] if scale_tuning else []

    def judged() -> float:
        with torch.no_grad():
            return sum(float(loss(index)) for index in held_out) / len(held_out)

    start = best = judged()
    states = {name: r.state() for name, r in roundings.items()}
    if not parameters and not stretches:
        return start, best
    every = max(1, iters // 5)
    order: list[int] = []
    for step in range(iters):
        if not order:
            order = [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
        value = loss(order.pop())
        grads = torch.autograd.grad(value, [*parameters, *stretches], allow_unused=True)
        rate = (1 - step / iters) / iters
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads[: len(parameters)], strict=True):
                if grad is not None:
                    parameter.sub_(grad.sign(), alpha=rate).clamp_(-0.5, 0.5)
            for stretch, grad in zip(stretches, grads[len(parameters) :], strict=True):
                if grad is not None:
                    stretch.sub_(grad.sign(), alpha=rate * 0.1).clamp_(0.5, 1.5)
        if (step + 1) % every == 0 or step + 1 == iters:
            now = judged()
            report(f"{step + 1}/{iters} loss {now:.3g}, start {start:.3g}")
            if now < best:
                best, states = now, {name: r.state() for name, r in roundings.items()}
    for name, rounding in roundings.items():
        rounding.restore(states[name])
    return start, best
