"""Scales of a weight by the method that a plan names, for every granularity of its format."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiler.scheme import Int
from ..runtime.quantize import round_scale, scale_for, scale_offset_for
from .scale_search import search_grid, search_scale
from .ssz import ssz_scale


def weight_scale(
    weight: Tensor, format: Int, dtype: torch.dtype, method: str = "minmax", importance: Tensor | None = None
) -> Tensor:
    """Symmetric scales [out, 1] or [out, groups], float32 values of ``dtype``; one per tensor stands in every row.

    Args:
        weight: [out, in] float32.
        format: Its bits and what shares a scale.
        dtype: In which the server holds scales.
        method: ``minmax`` (the largest weight), ``ssz``, ``clip``.
        importance: [in], the mean square of each input channel, for ``clip``.
    """
    if format.per == "tensor":
        spread = None if importance is None else importance.repeat(len(weight))
        one = weight_scale(weight.reshape(1, -1), Int(format.bits, "channel"), dtype, method, spread)
        return one.expand(len(weight), 1).contiguous()
    if method == "ssz":
        return ssz_scale(weight, format.bits, format.group, dtype)
    if method == "clip":
        return search_scale(weight, format.bits, format.group, dtype, importance)
    rows = weight.view(weight.shape[0], -1, format.group or weight.shape[1])
    return round_scale(scale_for(rows.abs().amax(-1), format.bits), dtype)


def weight_grid(
    weight: Tensor, format: Int, dtype: torch.dtype, method: str = "minmax", importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales as ``weight_scale`` finds them and, for an asymmetric format, offsets of the same shape.

    ``minmax`` spans the whole range of what shares a scale, ``clip`` searches a share of it; ``ssz`` is for symmetric
    formats (ValueError).
    """
    if format.symmetric:
        return weight_scale(weight, format, dtype, method, importance), None
    if method == "ssz":
        raise ValueError("ssz finds scales of symmetric weights")
    if format.per == "tensor":
        spread = None if importance is None else importance.repeat(len(weight))
        one = Int(format.bits, "channel", symmetric=False)
        scale, offset = weight_grid(weight.reshape(1, -1), one, dtype, method, spread)
        assert offset is not None
        return tuple(x.expand(len(weight), 1).contiguous() for x in (scale, offset))  # type: ignore[return-value]
    if method == "clip":
        return search_grid(weight, format.bits, format.group, dtype, importance)
    rows = weight.view(weight.shape[0], -1, format.group or weight.shape[1])
    return scale_offset_for(rows.amin(-1), rows.amax(-1), format.bits, dtype)
