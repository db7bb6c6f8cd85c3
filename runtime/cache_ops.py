"""Ops that put activations on int8 grids and take them off again: what an int8 cache writes and reads."""

from __future__ import annotations

import torch
from torch import Tensor

from .op import NPU_DTYPES, define
from .quantize import quantize_per_token


def _along(value: Tensor, x: Tensor, axis: int) -> Tensor:
    """value [n] so that it broadcasts along an axis of x."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return value.to(torch.float32).view(shape)


def _quantize(x: Tensor, scale: Tensor, offset: Tensor | None, axis: int) -> Tensor:
    shifted = x.to(torch.float32) / _along(scale, x, axis)
    if offset is not None:
        shifted.add_(_along(offset, x, axis))
    return shifted.round_().clamp_(-128, 127).to(torch.int8)


def _quantize_npu(x: Tensor, scale: Tensor, offset: Tensor | None, axis: int) -> Tensor:
    return torch.ops.npu.npu_quantize(x, scale, offset, NPU_DTYPES[torch.qint8], axis)


def _quantize_fake(x: Tensor, scale: Tensor, offset: Tensor | None, axis: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


QUANTIZE = define(
    "quantize(Tensor x, Tensor scale, Tensor? offset, int axis) -> Tensor",
    kernel=_quantize,
    fake=_quantize_fake,
    npu=_quantize_npu,
)
"""``round(x / scale + offset)`` within int8; scale and offset float [n], n being the size of the axis."""


def _dequantize(q: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = q.to(torch.float32)
    if offset is not None:
        y.add_(offset.to(torch.float32))
    return y.mul_(scale.to(torch.float32)).to(dtype)


def _dequantize_npu(q: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.ops.npu.npu_anti_quant(q, scale, offset=offset, dst_dtype=NPU_DTYPES[dtype])


def _dequantize_fake(q: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


DEQUANTIZE = define(
    "dequantize(Tensor q, Tensor scale, Tensor? offset, ScalarType dtype) -> Tensor",
    kernel=_dequantize,
    fake=_dequantize_fake,
    npu=_dequantize_npu,
)
"""``(q + offset) * scale`` of int8 [..., n] and float32 [n], in ``dtype``: the offset is added, as the NPU does."""


def _dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    integers, scale = quantize_per_token(x, 8)
    return integers, scale.squeeze(-1)


def _dynamic_npu(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.npu.npu_dynamic_quant(x)


def _dynamic_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


DYNAMIC_QUANTIZE = define(
    "dynamic_quantize(Tensor x) -> (Tensor, Tensor)", kernel=_dynamic, fake=_dynamic_fake, npu=_dynamic_npu
)
"""x [..., n] as int8 on a grid of its own per row, and the scales float32 [...]."""
