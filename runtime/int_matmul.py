"""Exact products of integer matrices on CPU."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

EXACT_FLOAT32 = 2**24
"""Integers up to here, and their sums in any order, are exact in float32."""


@cache
def _int_mm_is_fast_and_exact() -> bool:
    """Whether ``torch._int_mm`` has units for int8 here, and keeps 32 bits with them.

    Without units it is tens of times slower than float32, and some of its kernels saturate at 16 bits.
    """
    there = (name for name, has in torch.cpu.get_capabilities().items() if has)
    if not any(unit in name for name in there for unit in ("vnni", "amx_int8", "i8mm")):
        return False
    x = torch.full((32, 64), -128, dtype=torch.int8)
    w = torch.full((64, 32), -128, dtype=torch.int8)
    try:
        return bool((torch.ops.aten._int_mm(x, w) == 64 * 128 * 128).all())
    except (RuntimeError, NotImplementedError):
        return False


def int_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` of int8 [rows, K] and int8 [out, K] as int32 [rows, out], every bit exact.

    K is at most 131,071, where 32 bits still hold K * 128 * 128. Float32 products of slices of 1,024 channels
    (each below 2^24) stand in where the machine has no fast and exact integer kernel, and for a single channel, where
    the kernel of torch 2.13 misreads the strides.
    """
    if x.shape[-1] >= 2**17:
        raise ValueError(f"{x.shape[-1]} input channels may overflow 32 bits: the limit is {2**17 - 1}")
    if x.device.type == "cpu" and x.shape[0] and x.shape[1] > 1 and _int_mm_is_fast_and_exact():
        return torch.ops.aten._int_mm(x, weight.t())
    width = EXACT_FLOAT32 // (128 * 128)
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for a, b in zip(x.split(width, 1), weight.split(width, 1), strict=True):
        total += (a.to(torch.float32) @ b.to(torch.float32).t()).to(torch.int32)
    return total
