"""GPTQ: rounding one column at a time, each error carried into the columns that are still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiler.device import doubled
from ..runtime.quantize import qmax

BLOCK = 32
"""Columns whose errors are carried one by one; the others get them in one product."""

SMALL = 96
"""Rows of a triangle that is inverted at once."""
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
    if not bool(
        hessian.diagonal().isfinite().all()
    ):  # no entry is larger than those of its row and column there
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
    scales = _per_row(scale, width, order)
    offsets = None if offset is None else _per_row(offset, width, order)
    masks = None if outliers is None else outliers.T[order].contiguous()
    upper = inverse_factor(hessian[order][:, order], damping).to(hessian)
    sizes = upper.diagonal().tolist()
    integers, errors = torch.empty_like(columns), torch.empty_like(columns[:BLOCK])
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        for j in range(start, stop):
            column, step, integer, error = columns[j], scales[j], integers[j], errors[j - start]
            torch.div(column, step, out=integer)
            if offsets is not None:
                integer.add_(offsets[j])
            integer.round_().clamp_(-high - 1, high)
            level = integer if offsets is None else integer - offsets[j]
            torch.addcmul(column, level, step, value=-1, out=error)
            if masks is not None:
                integer.copy_(torch.where(masks[j], 0.0 if offsets is None else offsets[j], integer))
                error.copy_(torch.where(masks[j], column - column.to(dtype).float(), error))
            error.div_(sizes[j])
            columns[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return integers[back].T.contiguous(), columns[back].T.contiguous()


def _per_row(grid: Tensor, width: int, order: Tensor) -> Tensor:
    """A scale or offset [out, groups] of every column of a weight, in their order [width, out]."""
    if grid.shape[1] == 1:
        return grid.T.contiguous().expand(width, -1)
    return grid.T[order // (width // grid.shape[1])]


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of ``(H + λ I)⁻¹`` [n, n], float64; λ is ``damping`` mean diagonals, or more if needed.

    With rows and columns in the opposite order H + λ I is ``L Lᵀ``. In their own order that is ``R Rᵀ`` with R upper,
    so that R⁻¹ is the factor of the inverse, which need not be computed. Two matrices in float64 are held at a time.

    ValueError where no damping gives one.
    """
    mean = float(doubled(hessian.diagonal()).mean())
    while damping <= MOST_DAMPING:
        matrix = doubled(hessian).flip(0, 1)
        matrix.diagonal().add_(damping * mean if mean > 0 else 1.0)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            matrix = inverse_lower(matrix)
            if bool(matrix.sum().isfinite()):
                return matrix.flip(0, 1)
        damping *= 10
    raise ValueError("the Hessian of its inputs can not be factored, with however much damping")


def inverse_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix [n, n], by halves: most of it is matrix products."""
    size = len(lower)
    if size <= SMALL:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half, inverse = size // 2, torch.zeros_like(lower)
    first = inverse[:half, :half] = inverse_lower(lower[:half, :half])
    second = inverse[half:, half:] = inverse_lower(lower[half:, half:])
    torch.mm(second, lower[half:, :half] @ first, out=inverse[half:, :half]).neg_()
    return inverse


def inverse_diagonal(hessian: Tensor, damping: float) -> Tensor:
    """The diagonal of ``(H + λ I)⁻¹`` [n], float32, with the damping of ``inverse_factor``.

    ValueError for a Hessian that is not finite, or has no factors.
    """
    if not bool(
        hessian.diagonal().isfinite().all()
    ):  # no entry is larger than those of its row and column there
        raise ValueError("its inputs are not finite, or too large for their squares")
    return inverse_factor(hessian, damping).square().sum(0).to(hessian)
