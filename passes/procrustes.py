"""Adapting a rotation to data: the orthogonal matrix after which rows round with the least error."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiler.device import CPU, doubled
from ..runtime.quantize import qmax

SMALLEST = 1e-5
"""Least scale of a row (spec/modelslim.md 2.11)."""
PATIENCE = 5
"""Steps without improvement after which the search ends."""
CHUNK = 4096
"""Rows that are rounded at once."""


def rounded(rows: Tensor, bits: int) -> Tensor:
    """Rows [n, channels] on the symmetric grid of each row."""
    scale = (rows.abs().amax(-1, keepdim=True) / qmax(bits)).clamp(min=SMALLEST)
    return (rows / scale).round().clamp(-qmax(bits) - 1, qmax(bits)) * scale


def nearest_rotation(product: Tensor) -> Tensor:
    """The orthogonal R [n, n] that maximises ``tr(Rᵀ C)`` for C [n, n], float64.

    Only within the numerical range of C, a product of float32 rows; its null spaces are joined by the rotation that
    moves least, so that directions of which the data say nothing stay where they are.

    Source: Schönemann (1966), the orthogonal Procrustes problem; the restriction is what ``spec/modelslim.md`` 2.11
    asks for.
    """
    left, values, right = torch.linalg.svd(product)
    rank = int((values > values[0] * len(product) * torch.finfo(torch.float32).eps).sum())
    found = left[:, :rank] @ right[:rank]
    if rank == len(product):
        return found
    open_left, open_right = left[:, rank:], right[rank:]
    u, _, v = torch.linalg.svd(open_left.T @ open_right.T)
    return found + open_left @ (u @ v) @ open_right


@torch.no_grad()
def adapt(
    rows: Tensor, bits: int, steps: int, keeps_ones: bool = False, device: torch.device = CPU
) -> tuple[Tensor, float, float]:
    """The rotation R [n, n] that brings rows A [m, n] nearest to their own grid, float64; the error before and after.

    Repeats ``R <- R · polar((A R)ᵀ Q(A R))``, and keeps the R of least ``|| A R - Q(A R) ||``, the identity included.
    The error is relative to ``|| A ||``.

    Args:
        rows: [m, n] float32, on the host.
        bits: Of the grid, one scale per row.
        steps: Most turns; it ends after five without improvement.
        keeps_ones: Keep R · 1 = 1, for norms that subtract the mean.
        device: Where rows are turned and rounded, some at a time; R comes back to the host.

    Source: ``adapt_rotation`` of the reference tool (spec/modelslim.md 2.11), an orthogonal Procrustes iteration.
    """
    size = float(rows.double().square().sum().sqrt())
    width = rows.shape[1]
    turn = best = doubled(torch.eye(width, device=device))
    start = least = torch.inf
    waited = 0
    for step in range(steps + 1):
        product, error = torch.zeros_like(turn), 0.0
        small = turn.to(device, rows.dtype)
        for chunk in rows.split(CHUNK):
            turned = chunk.to(device) @ small
            wanted = rounded(turned, bits)
            error += float(doubled(turned - wanted).square().sum())
            product += (turned.T @ wanted).to(product)
        error = error**0.5 / max(size, torch.finfo(torch.float32).tiny)
        start = error if step == 0 else start
        waited = 0 if error < least else waited + 1
        if error < least:
            least, best = error, turn
        if waited == PATIENCE or step == steps:
            break
        if keeps_ones:
            product -= product.mean(0, keepdim=True)
            product -= product.mean(1, keepdim=True)
        turn = turn @ nearest_rotation(product)
    return best.cpu(), start, least
