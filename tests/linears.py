"""Integer linears of tests: random weights, quantized to any format and packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qc.runtime.formats import FORMATS
from qc.runtime.hadamard import random_hadamard
from qc.runtime.kronecker import fold
from qc.runtime.linear import IntegerLinear
from qc.runtime.quantize import quantize, round_scale, scale_for, scale_offset_for
from qc.runtime.quantized import QuantizedLinear

BF16, FP16 = torch.bfloat16, torch.float16
IN, OUT = 64, 24


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(
    cls: type[IntegerLinear], weight: Tensor, *, dtype: torch.dtype = BF16, group: int = 0, bias: bool = False
) -> QuantizedLinear:
    extra: dict[str, Any] = {}
    if cls.rotated:
        extra = {"left": random_hadamard(8, 1).to(dtype), "right": random_hadamard(8, 2).to(dtype)}
        weight = fold(weight, extra["left"], extra["right"])
    if cls.act_scope in ("tensor", "mix"):
        extra["input_scale"], extra["input_offset"] = scale_offset_for(
            torch.tensor([-4.0]), torch.tensor([4.5]), 8, dtype
        )
    absmax = weight.abs().unflatten(1, (-1, group or weight.shape[1])).amax(-1)
    scale = round_scale(scale_for(absmax, cls.weight_bits), cls.scale_dtype(dtype))
    given_bias = randn(weight.shape[0], seed=7).to(dtype) if bias else None
    return QuantizedLinear(quantize(weight, scale, cls.weight_bits), scale, bias=given_bias, **extra)


def module(
    cls: type[IntegerLinear], packed: dict[str, Tensor], dtype: torch.dtype = BF16, **options: Any
) -> IntegerLinear:
    out, width = packed["weight"].shape
    out *= 2 if cls.packed else 1
    built = cls(width, out, bias="bias" in packed, dtype=dtype, device="meta", **options)
    built.load_state_dict(packed, assign=True, strict=True)
    return built


def example(kind: str, *, bias: bool = False, dtype: torch.dtype = BF16) -> IntegerLinear:
    """A linear of one type with random weights."""
    cls = FORMATS[kind]
    return module(cls, cls.pack(quantized(cls, randn(OUT, IN), dtype=dtype, bias=bias), dtype), dtype)
