"""A learned transform before linears that read one value: a diagonal, a Kronecker pair, clip ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..compiler.scheme import Int, LinearScheme
from ..runtime.kronecker import rotate
from ..runtime.quantize import qmax
from .losses import Losses

KEPT = 4.0
"""The logit of a clip ratio at the start: 0.982 (FlatQuant, arXiv 2410.09426, appendix)."""


@dataclass
class Affine:
    """``x -> (x / d) (L ⊗ R)``, the same for all readers of a value, and the clip ratios of what comes of it.

    ``left`` [a, a], ``right`` [b, b] and ``log_diagonal`` [channels] (None: no diagonal) are trained, and logits of the
    clip ratio of the activation [1] and of each weight row or group. ``spread`` lays the diagonal out over the
    channels of the readers.
    """

    left: Tensor
    right: Tensor
    dtype: torch.dtype
    """In which the server holds the factors; they are rounded to it with a straight-through gradient."""
    readers: Mapping[str, LinearScheme]
    skew: tuple[Tensor, Tensor] | None = None
    """For factors that stay orthogonal: what is trained in their place, [a, a] and [b, b]; see ``cayley``."""
    log_diagonal: Tensor | None = None
    spread: Callable[[Tensor], Tensor] = lambda diagonal: diagonal
    weight_clip: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clip = torch.full((1,), KEPT, device=self.left.device)

    def parameters(self) -> list[Tensor]:
        """What moves at the plain rate."""
        factors = (self.left, self.right) if self.skew is None else self.skew
        return [*factors, *([] if self.log_diagonal is None else [self.log_diagonal])]

    def logits(self) -> list[Tensor]:
        """Clip ratios before their sigmoid, which move faster."""
        return [self.clip, *self.weight_clip.values()]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Left and right as they are now, before rounding."""
        if self.skew is None:
            return self.left, self.right
        return self.left @ cayley(self.skew[0]), self.right @ cayley(self.skew[1])

    def diagonal(self) -> Tensor | None:
        """d [channels of the writer]."""
        return None if self.log_diagonal is None else self.log_diagonal.exp()

    def act(self, x: Tensor, scheme: LinearScheme) -> Tensor:
        """x [..., in] transformed, on the grid of every token (of every rank's channels), differentiable."""
        assert scheme.act is not None
        diagonal = self.diagonal()
        if diagonal is not None:
            x = x / self.spread(diagonal).to(x.dtype)
        turned = rotate(x, *map(self._stored, self.factors()))
        blocks = x.shape[-1] // (len(self.left) * len(self.right))
        rows = turned.unflatten(-1, (blocks, -1))
        return on_grid(rows, scheme.act.bits, torch.sigmoid(self.clip).to(x.dtype)).flatten(-2)

    def weight(self, name: str, weight: Tensor, scheme: LinearScheme) -> Tensor:
        """W [out, in], what undoes the transform taken in, on the grid of every row or group, differentiable."""
        diagonal, bits = self.diagonal(), scheme.weight
        assert bits is not None
        if diagonal is not None:
            weight = weight * self.spread(diagonal)
        inverses = [torch.linalg.inv_ex(self._stored(factor)).inverse.T for factor in self.factors()]
        rows = grouped(rotate(weight, *inverses), bits)
        return on_grid(rows, bits.bits, torch.sigmoid(self.weight_clip[name])).reshape(weight.shape)

    def _stored(self, factor: Tensor) -> Tensor:
        return factor + (factor.to(self.dtype).to(factor.dtype) - factor).detach()


def cayley(free: Tensor) -> Tensor:
    """The rotation (I - A)(I + A)⁻¹ with A = S - Sᵀ, of any S [n, n]; the identity for zero.

    Source: the Cayley transform, as SpinQuant (arXiv 2405.16406) learns rotations along it.
    """
    skew, one = free - free.T, torch.eye(len(free), dtype=free.dtype, device=free.device)
    return torch.linalg.solve(one + skew, one - skew)


def grouped(weight: Tensor, bits: Int) -> Tensor:
    """[out, in] with what shares a scale along the last axis: [out, groups, in / groups], or [1, 1, out · in]."""
    if bits.per == "tensor":
        return weight.reshape(1, 1, -1)
    return weight.unflatten(-1, (-1, bits.group or weight.shape[-1]))


def on_grid(x: Tensor, bits: int, clip: Tensor) -> Tensor:
    """x on the symmetric grid of ``clip · max|x|`` along its last axis; rounding lets gradients through."""
    high = qmax(bits)
    scale = (x.abs().amax(-1, keepdim=True) * clip / high).clamp(min=torch.finfo(torch.float32).eps)
    levels = x / scale
    integers = (levels + (levels.round() - levels).detach()).clamp(-high - 1, high)
    return integers * scale


def train(
    affines: list[Affine], loss: Callable[[int], Tensor], training: list[int], held_out: list[int], *,
    iters: int, rate: float, generator: torch.Generator, report: Callable[[str], None],
) -> Losses:  # fmt: skip
    """Train in place by AdamW, and keep the state of least loss on the held-out microbatches, the start included.

    ``rate`` falls to zero along a cosine; clip ratios move ten times as fast.

    Source: FlatQuant (arXiv 2410.09426), section 3.1.
    """
    moved = [[p for one in affines for p in one.parameters()], [p for one in affines for p in one.logits()]]
    tensors = [*moved[0], *moved[1]]
    for tensor in tensors:
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(
        [{"params": moved[0], "lr": rate}, {"params": moved[1], "lr": 10 * rate}], weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(iters, 1))

    @torch.no_grad()
    def judged() -> float:
        return sum(float(loss(index)) for index in held_out) / len(held_out)

    losses = Losses([(0, judged())])
    kept = [tensor.detach().clone() for tensor in tensors]
    every, order = max(1, iters // JUDGED), list[int]()
    for step in range(iters):
        if not order:
            order = [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
        optimizer.zero_grad()
        found = loss(order.pop())
        losses.training.append(float(found.detach()))
        found.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % every == 0 or step + 1 == iters:
            now = judged()
            report(f"{step + 1}/{iters} loss {now:.4g}, start {losses.start:.4g}")
            if now < losses.best:
                kept = [tensor.detach().clone() for tensor in tensors]
            losses.held_out.append((step + 1, now))
    for tensor, state in zip(tensors, kept, strict=True):
        tensor.requires_grad_(False).copy_(state)
    return losses


JUDGED = 5
"""How often the held-out loss is looked at."""
