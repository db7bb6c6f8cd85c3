"""ADMM: the sparse weight whose products are nearest to those of the dense one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiler.device import doubled

ITERATIONS, PRUNING = 20, 15
"""Steps in all, and those in which the mask is still chosen (spec/modelslim.md 2.14)."""
DAMPING = 0.1
"""Added to the diagonal of the Hessian, as a share of its mean."""
PROTECTED = 0.02
"""Share of the weights, the largest by effect, that are never pruned and keep all their bits."""
IDLE = 1e-4
"""Size of a channel that is never active, as a share of the most active one's."""
MANTISSA = 2
"""Bits of the mantissa that other kept weights have behind the leading one."""


@torch.no_grad()
def admm_prune(weight: Tensor, hessian: Tensor, ratio: float) -> Tensor:
    """W [out, in] with ``ratio`` of its entries zero, near to W on inputs of this Hessian.

    Alternates ``Z`` (W plus the multipliers, all but the largest entries dropped) and the least-squares W for it. The
    share that is dropped rises with the third power over the first steps, then the mask stays.

    Args:
        weight: [out, in] float32.
        hessian: ``X Xᵀ / n`` of the inputs, [in, in] float32.
        ratio: Of entries that become zero, 0 to 1.

    Source: Fast and Effective Weight Update for Pruned LLMs (arXiv 2401.02938), algorithm 1 with gradual pruning.
    """
    norm = hessian.diagonal().sqrt()
    largest = float(norm.max())
    norm = norm.clamp(min=IDLE * largest) if largest > 0 else torch.ones_like(norm)
    scaled, small = weight * norm, hessian / norm[:, None] / norm
    damped = doubled(small)
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() if largest > 0 else 1.0)
    rho = damped.diagonal().mean()
    target = (scaled.to(damped) @ damped).to(scaled)
    damped.diagonal().add_(rho)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped)).to(scaled)
    protected = _largest(scaled.abs(), PROTECTED)
    now, multiplier = scaled, torch.zeros_like(scaled)
    mask = torch.ones_like(scaled, dtype=torch.bool)
    for step in range(ITERATIONS):
        if step < PRUNING:
            share = ratio * (1 - (1 - (step + 1) / PRUNING) ** 3)
            mask = _largest((now + multiplier).abs().masked_fill(protected, torch.inf), 1 - share)
        kept = (now + multiplier) * mask
        multiplier = multiplier + now - kept
        now = (target + float(rho) * (kept - multiplier)) @ inverse
    return (now + multiplier) * mask / norm


@torch.no_grad()
def short_mantissa(weight: Tensor, protected: Tensor) -> Tensor:
    """Weights rounded to ``1.xx · 2ᵉ``; those of the mask ``protected`` stay as they are."""
    mantissa, exponent = torch.frexp(weight)  # |mantissa| in [0.5, 1)
    steps = 2 ** (MANTISSA + 1)
    return torch.where(protected, weight, torch.ldexp((mantissa * steps).round() / steps, exponent))


def largest_by_effect(weight: Tensor, hessian: Tensor) -> Tensor:
    """The mask of weights that are protected: the largest times the size of their inputs."""
    return _largest((weight * hessian.diagonal().sqrt()).abs(), PROTECTED)


def _largest(size: Tensor, share: float) -> Tensor:
    """The mask of this share of the entries, the largest of each row."""
    count = round(share * size.shape[1])
    mask = torch.zeros_like(size, dtype=torch.bool)
    return mask.scatter_(1, size.topk(count, dim=1).indices, True) if count else mask
