"""GPTQ: rounding one column at a time, each error carried into the columns that are still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.quantize import qmax

BLOCK = 32
"""Columns whose errors are carried one by one; the others get them in one product."""


@torch.no_grad()
def gptq(
    weight: Tensor, scale: Tensor, hessian: Tensor, bits: int, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Integers [out, in] (float32) that minimise ``|| (W - s q) X ||``, and the compensated weight that they round.

    Columns are taken in the order of falling ``diag(H)``. Channels that were never active get ``damping`` times
    the mean of the diagonal like all others, so that H is always positive definite.

    Args:
        weight: [out, in] float32.
        scale: [out, groups] float32.
        hessian: ``X Xᵀ / n`` of the (quantized) inputs, [in, in] float32.
        bits: Of the integers.
        damping: Added to the diagonal, as a share of its mean.

    Source: GPTQ (arXiv 2210.17323), algorithm 1, with activation order.
    """
    high = qmax(bits)
    width = weight.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    back = torch.argsort(order)
    columns = weight.T[order].contiguous()  # [in, out]: a column of the weight is a row here
    scales = scale.repeat_interleave(width // scale.shape[1], dim=1).T[order].contiguous()
    damped = hessian[order][:, order].double()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    integers = torch.empty_like(columns)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        local, errors = upper[start:stop, start:stop], torch.empty_like(columns[start:stop])
        for j in range(stop - start):
            column, step = columns[start + j], scales[start + j]
            integer = (column / step).round_().clamp_(-high - 1, high)
            integers[start + j] = integer
            errors[j] = (column - integer * step) / local[j, j]
            columns[start + j + 1 : stop].addr_(local[j, j + 1 :], errors[j], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return integers[back].T.contiguous(), columns[back].T.contiguous()
