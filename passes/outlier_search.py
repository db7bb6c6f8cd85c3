"""Outlier search: the single weights without which the others are rounded best."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiler.scheme import Int
from ..runtime.quantize import dequantize, quantize
from .weight_scale import weight_grid

TURNS = 4
"""Turns in which outliers are taken out: each sees the grids that those before it leave."""


@torch.no_grad()
def outlier_mask(weight: Tensor, format: Int, dtype: torch.dtype, sensitivity: Tensor, count: int) -> Tensor:
    """Mask [out, in] of ``count`` weights, those whose removal makes the error of the others fall most.

    The error of what shares a scale is ``Σ sⱼ (w - Q(w))²``. A weight that is neither the lowest nor the highest of
    them has its own error as gain, for the grid does not depend on it; for those two the grid without them is tried.

    Args:
        weight: [out, in] float32.
        format: Of the integers.
        dtype: In which the server holds scales.
        sensitivity: s [in], ``1 / [H⁻¹]ⱼⱼ`` of the Hessian of the inputs.
        count: How many, at most all of them.

    Source: SpQR (arXiv 2306.03078), section 4.2 and algorithm 2: there a threshold decides, here a number.
    """
    weight = weight.contiguous()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for turn in range(TURNS):
        take = count * (turn + 1) // TURNS - count * turn // TURNS
        if take:
            gains = _gains(weight.masked_fill(mask, 0.0), format, dtype, sensitivity).masked_fill(
                mask, -torch.inf
            )
            mask.view(-1)[gains.flatten().topk(take).indices] = True
    return mask


def _gains(weight: Tensor, format: Int, dtype: torch.dtype, sensitivity: Tensor) -> Tensor:
    """How much the error of what shares a scale falls without each weight [out, in]."""
    errors = _errors(weight, format, dtype, sensitivity)
    gains, groups = errors.clone(), _grouped(weight, format)
    base = _grouped(errors, format).sum(-1)
    for extreme in (groups.argmax(-1, keepdim=True), groups.argmin(-1, keepdim=True)):
        left = groups.scatter(-1, extreme, 0.0).reshape(weight.shape)
        fallen = base - _grouped(_errors(left, format, dtype, sensitivity), format).sum(-1)
        _grouped(gains, format).scatter_(-1, extreme, fallen[..., None])
    return gains


def _errors(weight: Tensor, format: Int, dtype: torch.dtype, sensitivity: Tensor) -> Tensor:
    scale, offset = weight_grid(weight, format, dtype)
    return (
        dequantize(quantize(weight, scale, format.bits, offset), scale, offset) - weight
    ).square() * sensitivity


def _grouped(weight: Tensor, format: Int) -> Tensor:
    """A view with what shares a scale along the last axis."""
    if format.per == "tensor":
        return weight.view(1, 1, -1)
    return weight.view(len(weight), -1, format.group or weight.shape[1])
