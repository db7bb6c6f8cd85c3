"""Ranges of static activations: lowest and highest value, or the range whose grid has the least square error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..compiler.device import doubled
from ..compiler.errors import Failed
from ..compiler.operand import Quantize
from ..compiler.scheme import Int, LinearScheme
from ..runtime.quantize import dequantize, quantize, round_scale, scale_for, scale_offset_for

STATISTICS = {"minmax": "range", "histogram": "histogram"}
"""Methods, with the statistic that each asks for."""
RATIOS = 64
"""Cuts that are tried of each side of a range."""
ROUNDS = 3
"""How often both sides are gone through."""


def static_range(
    statistics: Mapping[str, Tensor], operand: Quantize, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Scale [1] and offset [1] of a static activation; None for others."""
    scheme = operand.scheme
    if not scheme.ranged:
        return None, None
    assert scheme.act is not None
    if operand.act_method == "histogram":
        return clipped_range(statistics["histogram"], scheme.act, dtype)
    return input_range(statistics["range"], scheme, dtype)


def act_scale(low: Tensor, high: Tensor, act: Int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and offset [n] from lowest and highest values [n], as a server of ``dtype`` holds them.

    A symmetric format has offsets of zero.
    """
    if act.symmetric:
        scale = round_scale(scale_for(torch.maximum(low.abs(), high.abs()), act.bits), dtype)
        return scale, torch.zeros_like(scale)
    return scale_offset_for(low, high, act.bits, dtype)


def input_range(observed: Tensor, scheme: LinearScheme, export_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale [1] and offset [1] of a static activation from its observed range [2, in]."""
    assert scheme.act is not None
    low, high = observed[0].min(), observed[1].max()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise Failed("a static activation range is not finite: calibration data were not seen by this linear")
    return act_scale(low[None], high[None], scheme.act, export_dtype)


@torch.no_grad()
def clipped_range(histogram: Tensor, act: Int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale [1] and offset [1] of the grid with the least error ``sum_i n_i (x_i - Q(x_i))²``.

    One side of the range at a time is cut to shares of its own width, with the real grid each time; the whole range
    is among the candidates, so minimum and maximum are never beaten by what comes out.

    Args:
        histogram: Counts and middles of bins, [2, bins]; the outer middles are the exact range.
        act: The format.
        dtype: The dtype in which the server holds the scale.

    Source: the L2 search of PyTorch's ``HistogramObserver``, without its assumption of a uniform density.
    """
    counts, middles = doubled(histogram)
    low, high = middles[0].clamp(max=0), middles[-1].clamp(min=0)
    shares = torch.linspace(1, 1 / RATIOS, RATIOS, dtype=torch.float64, device=counts.device)

    def best(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        scale, offset = act_scale(lows, highs, act, dtype)
        columns = scale[:, None], offset[:, None]
        x = middles.float()[None]
        rounded = dequantize(quantize(x.expand(len(scale), -1), columns[0], act.bits, columns[1]), *columns)
        error = ((rounded.double() - middles) ** 2 * counts).sum(1)
        least = int(error.argmin())
        return lows[least], highs[least]

    if act.symmetric:
        top = torch.maximum(-low, high) * shares
        low, high = best(-top, top)
    else:
        whole = low, high
        for _ in range(ROUNDS):
            low, high = best(whole[0] * shares, high.expand(RATIOS))
            low, high = best(low.expand(RATIOS), whole[1] * shares)
    scale, offset = act_scale(low[None], high[None], act, dtype)
    return scale.to(histogram), offset.to(histogram)
