"""Exact products of integer matrices."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .cpu_units import has_units

EXACT_FLOAT32 = 2**24
"""Integers up to here, and their sums in any order, are exact in float32."""
CUDA_ROWS = 32
"""``torch._int_mm`` on CUDA takes more than 16 rows; fewer are padded to so many."""


@cache
def int_mm_is_fast_and_exact() -> bool:
    """Whether ``torch._int_mm`` has units for int8 on this CPU, and keeps 32 bits with them.

    Without units it is tens of times slower than float32, and kernels for older CPUs saturate sums of two products at
    16 bits.
    """
    if not has_units("vnni", "amx_int8", "i8mm"):
        return False
    try:
        return all(_is_exact(rows, a, b) for rows in (1, 32) for a in (-128, 127) for b in (-128, 127))
    except (RuntimeError, NotImplementedError):
        return False


def _is_exact(rows: int, a: int, b: int) -> bool:
    x = torch.full((rows, 64), a, dtype=torch.int8)
    w = torch.full((64, 64), b, dtype=torch.int8)
    return bool((torch.ops.aten._int_mm(x, w.t()) == 64 * a * b).all())


def int_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` of int8 [rows, K] and int8 [out, K] as int32 [rows, out], every bit exact.

    K is at most 131,071, where 32 bits still hold K * 128 * 128. Float32 products of slices of 1,024 channels
    (each below 2^24) stand in where the machine has no fast and exact integer kernel, and for a single channel, where
    the kernel of torch 2.13 misreads the strides.
    """
    if x.shape[-1] >= 2**17:
        raise ValueError(f"{x.shape[-1]} input channels may overflow 32 bits: the limit is {2**17 - 1}")
    if x.device.type == "cpu" and x.shape[0] and x.shape[1] > 1 and int_mm_is_fast_and_exact():
        return torch.ops.aten._int_mm(x, weight.t())
    if x.device.type == "cuda" and x.shape[0] and not (x.shape[1] % 8 or weight.shape[0] % 8):
        rows = x.shape[0]
        padded = x if rows > 16 else torch.nn.functional.pad(x, (0, 0, 0, CUDA_ROWS - rows))
        return torch.ops.aten._int_mm(padded, weight.t())[:rows]
    width = EXACT_FLOAT32 // (128 * 128)
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for a, b in zip(x.split(width, 1), weight.split(width, 1), strict=True):
        total += (a.to(torch.float32) @ b.to(torch.float32).t()).to(torch.int32)
    return total
