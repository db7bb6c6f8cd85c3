"""Linears with int8 weights that serve both phases: activations per token in prefill, on a fixed scale in decode."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import IntegerLinear
from .quantized import QuantizedLinear
from .w8a8 import W8A8, W8A8_DYNAMIC, prepare_static, static


class W8A8Mix(IntegerLinear):
    """One int8 weight with the tensors of ``W8A8_DYNAMIC`` and those of static ``W8A8`` ("pd_mix").

    Which arithmetic runs is the server's choice by phase; here it is ``decode``, and prefill's by default.
    """

    type = "W8A8_MIX"
    weight_bits = 8
    act_bits = 8
    act_scope = "mix"
    grouped = False
    offsets = False
    adds_bias = True
    decode = False
    """Whether the fixed scale is used, as the server does on a decoding node."""

    def tensors(self, bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Those of both; the bias stands in ``quant_bias`` too."""
        out = (self.out_features,)
        return super().tensors(bias) | {
            "input_scale": (self.dtype, (1,)),
            "input_offset": (torch.int8, (1,)),
            "quant_bias": (torch.int32, out),
            "deq_scale": (torch.int64 if self.dtype == torch.float16 else torch.float32, out),
        }

    @classmethod
    def pack(cls, q: QuantizedLinear, dtype: torch.dtype, row_parallel: bool = False) -> dict[str, Tensor]:
        """The tensors on disk. ValueError as for every format."""
        return W8A8.pack(q, dtype) | super().pack(q, dtype)

    @property
    def added_bias(self) -> Tensor | None:
        """None in decode, where the bias is in the integers."""
        return None if self.decode else self.bias

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``qc::w8a8_dynamic``, or ``qc::w8a8_static`` in decode."""
        return static(self, x) if self.decode else W8A8_DYNAMIC(x, self.weight, self.scale, None, bias)

    def _prepare(self) -> None:
        super()._prepare()
        prepare_static(self)
