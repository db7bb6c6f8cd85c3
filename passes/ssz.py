"""SSZ: scales and integers of a weight, each in turn the best for the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.quantize import qmax, round_scale, scale_for

STEPS = 50
"""Most turns."""
SETTLED = 1e-10
"""Largest change of a scale that counts as none."""


@torch.no_grad()
def ssz_scale(weight: Tensor, bits: int, group: int, dtype: torch.dtype, steps: int = STEPS) -> Tensor:
    """Symmetric scales [out, groups] by alternating ``q = round(W / s)`` and least squares ``s = Σ W q / Σ q²``.

    Of all scales met, each row or group keeps the one with the least square error, judged as it is stored.

    Args:
        weight: [out, in] float32.
        bits: Of the integers.
        group: Input channels per scale; 0 for one scale per row.
        dtype: The dtype in which the server holds scales; float32 values of it are returned.
        steps: Most turns.

    Source: the recipe's method ``ssz`` (spec/modelslim.md 2.9); Lloyd's algorithm for a uniform grid.
    """
    rows = weight.view(weight.shape[0], -1, group or weight.shape[1])
    scale = scale_for(rows.abs().amax(-1), bits)
    best, least = round_scale(scale, dtype), torch.full_like(scale, torch.inf)
    for _ in range(steps):
        stored = round_scale(scale, dtype)
        integers = _integers(rows, stored, bits)
        error = (integers * stored[..., None] - rows).square().sum(-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, stored, best)
        square = integers.square().sum(-1)
        fitted = torch.where(square > 0, (rows * integers).sum(-1) / square.clamp(min=1), scale)
        if float((fitted - scale).abs().max()) < SETTLED:
            break
        scale = fitted
    return best


def _integers(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (rows / scale[..., None]).round().clamp(-qmax(bits) - 1, qmax(bits))
