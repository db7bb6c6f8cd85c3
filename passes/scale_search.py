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
    groups, high = weight.shape[1] // width, qmax(bits)
    rows = weight.reshape(len(weight), -1, width).flatten(0, 1)
    absmax = rows.abs().amax(-1)
    weigh = None if importance is None else importance.float().view(groups, width)
    ratios = (
        torch.linspace(1, SMALLEST_RATIO, GRID + 1, dtype=torch.float64).float()[:, None].to(absmax.device)
    )
    best = torch.empty_like(absmax)
    chunk = max(1, CHUNK // weight.shape[1]) * groups
    for some, largest, found in zip(rows.split(chunk), absmax.split(chunk), best.split(chunk), strict=True):
        scales = round_scale(scale_for(largest * ratios, bits), dtype)
        errors, minus, error = torch.empty_like(scales), -some, torch.empty_like(some)
        for scale, total in zip(scales[:, :, None], errors, strict=True):
            torch.div(some, scale, out=error).round_().clamp_(-high - 1, high)
            torch.addcmul(minus, error, scale, out=error).square_()
            if weigh is not None:
                error.view(-1, groups, width).mul_(weigh)
            torch.sum(error, -1, out=total)
        found.copy_(scales.gather(0, errors.argmin(0)[None])[0])
    return best.view(-1, groups)


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
