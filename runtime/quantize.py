"""The arithmetic of quantization that every linear and every pass shares: scales, integers, rounding.

Rounding is half to even; the symmetric range reaches down to -2^(bits-1), as the hardware's does; integers
are always computed from scales that are already rounded to the dtype in which the server holds them.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
"""The scale of a row of zeros."""


def qmax(bits: int) -> int:
    """Largest signed integer of ``bits`` bits."""
    return 2 ** (bits - 1) - 1


def scale_for(absmax: Tensor, bits: int) -> Tensor:
    """The symmetric scale absmax / qmax, float32 of any shape; EPS where it would be zero or subnormal."""
    scale = absmax.to(torch.float32) / qmax(bits)
    return torch.where(scale < torch.finfo(torch.float32).tiny, EPS, scale)


def scale_offset_for(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Asymmetric scale (rounded to ``dtype``) and offset for the range [min(low, 0), max(high, 0)], float32.

    ``offset = round(-low / scale) - 2^(bits-1)`` lives in the signed domain: x is about (q - offset) * scale.
    """
    low, high = low.to(torch.float32).clamp(max=0), high.to(torch.float32).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = round_scale(torch.where(scale < torch.finfo(torch.float32).tiny, EPS, scale), dtype)
    offset = torch.round(-low / scale) - 2 ** (bits - 1)
    return scale, offset.clamp(-(2 ** (bits - 1)), qmax(bits))


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` rounded to the values of ``dtype``, still float32, and never below its smallest normal."""
    return scale.to(torch.float32).clamp(min=torch.finfo(dtype).tiny).to(dtype).to(torch.float32)


def _per_column(scale: Tensor, columns: int) -> Tensor:
    """A scale of [out, groups] as [out, columns]; one of one column, or of no row, broadcasts as it is."""
    groups = scale.shape[-1] if scale.dim() else 1
    if groups == 1:
        return scale
    if columns % groups:
        raise ValueError(f"{groups} groups do not divide {columns} channels")
    return scale.repeat_interleave(columns // groups, dim=-1)


def quantize(x: Tensor, scale: Tensor, bits: int, offset: Tensor | None = None) -> Tensor:
    """Integers clamp(round(x / scale + offset)), int8 of x's shape.

    ``scale`` and ``offset`` broadcast against x, or are [out, groups] for x [out, in] in groups along in.
    """
    scaled = x / _per_column(scale, x.shape[-1])
    if offset is not None:
        scaled = scaled + _per_column(offset, x.shape[-1])
    return scaled.round_().clamp_(-(2 ** (bits - 1)), qmax(bits)).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """(q - offset) * scale, in the dtype of ``scale``; the same broadcasting as :func:`quantize`."""
    values = q.to(scale.dtype)
    if offset is not None:
        values = values - _per_column(offset, q.shape[-1])
    return values * _per_column(scale, q.shape[-1])


def quantize_per_token(x: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """What the NPU does to an activation at run time: integers int8 [..., K] and scale float32 [..., 1].

    ``scale = clip * max|row| / qmax``; a row of zeros gives zeros.
    """
    absmax = (
        x.abs().amax(-1, keepdim=True).to(torch.float32)
    )  # of numbers of x's dtype, so nothing is rounded
    scale = scale_for(absmax if clip == 1 else absmax * clip, bits)
    if clip != 1 or x.dtype == torch.float32:
        return quantize(x.to(torch.float32), scale, bits), scale
    integers = (
        x.to(torch.float32).div_(scale).round_()
    )  # within the range already: no row exceeds its own maximum
    return integers.to(torch.int8), scale


def quantize_per_tensor(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As ``quantize_per_token``, on one scale for all of x: integers int8 [..., K] and scale float32 [1, 1]."""
    x = x.to(torch.float32)
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    scale = scale_for(largest, bits).reshape(1, 1)
    return quantize(x, scale, bits), scale


def fake_quant_per_tensor(x: Tensor, bits: int) -> Tensor:
    """x on one grid for all of its values: [..., K] in the dtype of x."""
    integers, scale = quantize_per_tensor(x, bits)
    return (integers * scale).to(x.dtype)


def fake_quant_per_token(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """x on its own per-token grid: [..., K] in the dtype of x."""
    integers, scale = quantize_per_token(x, bits, clip)
    return (integers * scale).to(x.dtype)
