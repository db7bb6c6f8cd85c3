"""Scale search: the clipping ratio of each row or group that rounds a weight with the least error."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.quantize import qmax, round_scale, scale_for, scale_offset_for

GRID = 40
SMALLEST_RATIO = 0.35
CHUNK = 1 << 16
"""Weights that are searched at once: few enough to stay in the cache of a core."""


@torch.no_grad()
def search_scale(
    weight: Tensor, bits: int, group: int, dtype: torch.dtype, importance: Tensor | None = None
) -> Tensor:
    """Symmetric scales [out, groups] that minimise ``sum_k i_k (w_k - s round(w_k / s))²`` over clipping ratios.

    Args:
        weight: [out, in] float32.
        bits: Of the integers.
        group: Input channels per scale; 0 for one scale per row.
        dtype: The dtype in which the server holds scales; float32 values of it are returned.
        importance: ``i`` [in], the mean square of each input channel; None weighs all alike.

    Source: the clip search of AWQ (arXiv 2306.00978) section 3.3, on the weight's own error.
    """
    width = group or weight.shape[1]
    rows = weight.view(weight.shape[0], -1, width)
    absmax = rows.abs().amax(-1)
    weigh = 1.0 if importance is None else importance.float().view(1, -1, width)
    best = round_scale(scale_for(absmax, bits), dtype)
    chunk = max(1, CHUNK // weight.shape[1])
    for some, largest, found in zip(rows.split(chunk), absmax.split(chunk), best.split(chunk), strict=True):
        least = torch.full_like(largest, torch.inf)
        for step in range(GRID + 1):
            ratio = 1 - (1 - SMALLEST_RATIO) * step / GRID
            scale = round_scale(scale_for(largest * ratio, bits), dtype)
            rounded = (some / scale[..., None]).round_().clamp_(-qmax(bits) - 1, qmax(bits))
            error = rounded.mul_(scale[..., None]).sub_(some).square_().mul_(weigh).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            found.copy_(torch.where(better, scale, found))  # a view of best
    return best


@torch.no_grad()
def search_grid(
    weight: Tensor, bits: int, group: int, dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Asymmetric scales and offsets [out, groups] of least error, both ends of the range cut by one ratio.

    Arguments as for ``search_scale``.
    """
    width = group or weight.shape[1]
    rows = weight.view(weight.shape[0], -1, width)
    low, high = rows.amin(-1), rows.amax(-1)
    weigh = 1.0 if importance is None else importance.float().view(1, -1, width)
    best = scale_offset_for(low, high, bits, dtype)
    least = torch.full_like(low, torch.inf)
    for step in range(GRID + 1):
        ratio = 1 - (1 - SMALLEST_RATIO) * step / GRID
        scale, offset = scale_offset_for(low * ratio, high * ratio, bits, dtype)
        integers = (rows / scale[..., None] + offset[..., None]).round().clamp(-qmax(bits) - 1, qmax(bits))
        error = (((integers - offset[..., None]) * scale[..., None] - rows).square() * weigh).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(torch.where(better, new, old) for new, old in zip((scale, offset), best, strict=True))
    return best  # type: ignore[return-value]
