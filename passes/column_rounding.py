"""GPTQ: rounding one column at a time, each error carried into the columns that are still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiler.device import doubled
from ..runtime.quantize import qmax

BLOCK = 32
"""Columns whose errors are carried one by one; the others get them in one product."""


MOST_DAMPING = 10.0
"""As a share of the mean diagonal: with so much of it every Hessian of real inputs has its factors."""


@torch.no_grad()
def gptq(
    weight: Tensor,
    scale: Tensor,
    hessian: Tensor,
    bits: int,
    damping: float = 0.01,
    act_order: bool = True,
    offset: Tensor | None = None,
    outliers: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Integers [out, in] (float32) that minimise ``|| (W - s q) X ||``, and the compensated weight that they round.

    Channels that were never active get ``damping`` times the mean of the diagonal like all others, so that H is
    positive definite. Where rounding errors make it singular all the same, the damping is ten times as much, and again.

    Args:
        weight: [out, in] float32.
        scale: [out, groups] float32.
        hessian: ``X Xᵀ / n`` of the (quantized) inputs, [in, in] float32.
        bits: Of the integers.
        damping: Added to the diagonal, as a share of its mean.
        offset: Of the shape of ``scale``: a weight is about (q - offset) * scale; None is zero.
        outliers: Mask [out, in] of weights that stay float: their integers stand for zero, their errors are those of
            ``dtype``, and the compensated weight holds them.
        dtype: In which those are stored.
        act_order: Take columns in the order of falling ``diag(H)``, else as they stand.

    Raises:
        ValueError: A Hessian that is not finite, or has no factors with any damping.

    Source: GPTQ (arXiv 2210.17323), algorithm 1, and the activation order of its implementation.
    """
    if not bool(hessian.isfinite().all()):
        raise ValueError("its inputs are not finite, or too large for their squares")
    high = qmax(bits)
    width = weight.shape[1]
    diagonal = hessian.diagonal()
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if act_order
        else torch.arange(width, device=weight.device)
    )
    back = torch.argsort(order)
    columns = weight.T[order].contiguous()  # [in, out]: a column of the weight is a row here
    scales = scale.repeat_interleave(width // scale.shape[1], dim=1).T[order].contiguous()
    offsets = None
    if offset is not None:
        offsets = offset.repeat_interleave(width // offset.shape[1], dim=1).T[order].contiguous()
    masks = None if outliers is None else outliers.T[order].contiguous()
    upper = inverse_factor(hessian[order][:, order], damping).to(hessian)
    integers = torch.empty_like(columns)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        local, errors = upper[start:stop, start:stop], torch.empty_like(columns[start:stop])
        for j in range(stop - start):
            column, step = columns[start + j], scales[start + j]
            zero = 0.0 if offsets is None else offsets[start + j]
            integer = (column / step + zero).round_().clamp_(-high - 1, high)
            value = (integer - zero) * step
            if masks is not None:
                integer = torch.where(masks[start + j], zero, integer)
                value = torch.where(masks[start + j], column.to(dtype).float(), value)
            integers[start + j] = integer
            errors[j] = (column - value) / local[j, j]
            columns[start + j + 1 : stop].addr_(local[j, j + 1 :], errors[j], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return integers[back].T.contiguous(), columns[back].T.contiguous()


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of ``(H + λ I)⁻¹`` [n, n], float64; λ is ``damping`` mean diagonals, or more if needed.

    Two matrices in float64 are held at a time, and H. ValueError where no damping gives a factor.
    """
    mean = float(doubled(hessian.diagonal()).mean())
    while damping <= MOST_DAMPING:
        matrix = doubled(hessian).clone()
        matrix.diagonal().add_(damping * mean if mean > 0 else 1.0)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            matrix = torch.cholesky_inverse(matrix)
            matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True)
            if not failed and bool(matrix.isfinite().all()):
                return matrix
        damping *= 10
    raise ValueError("the Hessian of its inputs can not be factored, with however much damping")


def inverse_diagonal(hessian: Tensor, damping: float) -> Tensor:
    """The diagonal of ``(H + λ I)⁻¹`` [n], float32, with the damping of ``inverse_factor``.

    ValueError for a Hessian that is not finite, or has no factors.
    """
    if not bool(hessian.isfinite().all()):
        raise ValueError("its inputs are not finite, or too large for their squares")
    return inverse_factor(hessian, damping).square().sum(0).to(hessian)
