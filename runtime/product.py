"""The product of two quantized matrices, and the way back to the dtype of the activation."""

from __future__ import annotations

import torch
from torch import Tensor

from .int_matmul import int_matmul
from .op import unflat
from .quantize import dequantize


def product(
    integers: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor | None = None
) -> Tensor:
    """Integers int8 [rows, in] on the grid ``scale`` [rows, 1] times a weight int8 [out, in], float32 [rows, out].

    ``scale`` may be [1, 1]. ``weight_scale`` is float32 [out, groups], ``weight_offset`` of its shape and integral: the
    weight is (weight + weight_offset) * weight_scale. Sums of one group per channel are exact integers, with an
    offset o as ``Σ x (w + o) = Σ x w + o Σ x``; the scale of the weight meets them first and that of the row second.
    """
    if weight_scale.shape[-1] > 1:
        y = integers.to(torch.float32) @ shifted(weight, weight_scale, weight_offset).t()
    else:
        sums = int_matmul(integers, weight)
        if weight_offset is not None:
            sums = sums + integers.sum(1, keepdim=True, dtype=torch.int64) * weight_offset.t().to(torch.int64)
        y = sums.to(torch.float32).mul_(weight_scale.t())
    return y.mul_(scale)


def shifted(weight: Tensor, weight_scale: Tensor, weight_offset: Tensor | None) -> Tensor:
    """``(weight + weight_offset) * weight_scale`` of int8 [out, in] and [out, groups], float32 [out, in]."""
    return dequantize(weight, weight_scale, None if weight_offset is None else -weight_offset)


def finish(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Rows y float32 [n, out] plus a bias [out], in the dtype and the leading shape of x [..., in].

    y is used up. Its own memory is returned only where it is a new tensor of the kernel.
    """
    if bias is not None:
        y.add_(bias.to(y.dtype))
    return unflat(y.to(x.dtype), x)
