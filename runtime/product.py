"""The product of two quantized matrices, and the way back to the dtype of the activation."""

from __future__ import annotations

import torch
from torch import Tensor

from .int_matmul import int_matmul
from .op import unflat
from .quantize import dequantize


def product(integers: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Integers int8 [rows, in] on the grid ``scale`` [rows, 1] times a weight int8 [out, in], float32 [rows, out].

    ``weight_scale`` is float32 [out, groups]. Sums of one group per channel are exact integers, which the scale of the
    weight meets first and that of the row second.
    """
    if weight_scale.shape[-1] > 1:
        y = integers.to(torch.float32) @ dequantize(weight, weight_scale).t()
    else:
        y = int_matmul(integers, weight).to(torch.float32).mul_(weight_scale.t())
    return y.mul_(scale)


def finish(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Rows y float32 [n, out] plus a bias [out], in the dtype and the leading shape of x [..., in].

    y is used up. Its own memory is returned only where it is a new tensor of the kernel.
    """
    if bias is not None:
        y.add_(bias.to(y.dtype))
    return unflat(y.to(x.dtype), x)
