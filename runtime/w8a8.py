"""Linears with int8 weights and int8 activations, on a scale per token or on one fixed by calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from .int_matmul import int_matmul
from .linear import IntegerLinear
from .quantize import quantize_per_tensor, quantize_per_token
from .quantized import QuantizedLinear


class W8A8Dynamic(IntegerLinear):
    """int8 per output channel (or group), int8 per token: ``npu_dynamic_quant`` and ``npu_quant_matmul``."""

    type = "W8A8_DYNAMIC"
    weight_bits = 8
    act_bits = 8

    def rows(self, x: Tensor) -> Tensor:
        """float32 [rows, out] of float [rows, in]."""
        return self.product(*quantize_per_token(x, 8))


class W8A8DynamicTensor(IntegerLinear):
    """int8 per output channel (or group or tensor), int8 on one scale for all tokens of a call, found while it runs.

    What a token becomes depends on the tokens that are run with it. Source: SmoothQuant O2 (arXiv 2211.10438).
    """

    type = "W8A8_DYNAMIC_TENSOR"
    weight_bits = 8
    act_bits = 8
    act_scope = "dynamic-tensor"

    def rows(self, x: Tensor) -> Tensor:
        """float32 [rows, out] of float [rows, in]."""
        return self.product(*quantize_per_tensor(x, 8))


class W8A8(IntegerLinear):
    """int8 per output channel, int8 per tensor with an offset: ``npu_quantize``, then ``npu_quant_matmul``.

    ``y = (q @ weight.T + quant_bias) * deq_scale`` with ``q = round(x / input_scale + input_offset)``. The
    server multiplies by the reciprocal of the input scale, rounded to the model's dtype; so does this module.
    The float bias lives in ``quant_bias``: the server ignores a tensor of its own, so there is none.
    """

    type = "W8A8"
    weight_bits = 8
    act_bits = 8
    act_scope = "tensor"
    grouped = False
    offsets = False

    def tensors(self, bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """``deq_scale`` is float32; in a float16 model it is float32's bit pattern, widened to int64."""
        out = (self.out_features,)
        return {
            "weight": (torch.int8, (self.out_features, self.in_features)),
            "input_scale": (self.dtype, (1,)),
            "input_offset": (torch.int8, (1,)),
            "quant_bias": (torch.int32, out),
            "deq_scale": (torch.int64 if self.dtype == torch.float16 else torch.float32, out),
        }

    @classmethod
    def scale_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """float32: the server sees the weight's scale inside ``deq_scale`` alone."""
        return torch.float32

    @classmethod
    def pack(cls, q: QuantizedLinear, dtype: torch.dtype, row_parallel: bool = False) -> dict[str, Tensor]:
        """The tensors on disk; the bias is folded into ``quant_bias``. ValueError as for every format."""
        cls._check(q, dtype)
        assert q.input_scale is not None, "checked"
        assert q.input_offset is not None, "checked"
        scale = q.input_scale.reshape(1).to(torch.float32)
        offset = q.input_offset.reshape(1)
        if not scale.to(dtype).to(torch.float32).equal(scale):
            raise ValueError(
                f"cannot pack as W8A8: round the input scale to {dtype} before computing the offset"
            )
        if not offset.to(torch.int8).to(offset.dtype).equal(offset):
            raise ValueError(f"cannot pack as W8A8: the input offset {offset.item()} is not an int8")
        deq_scale = (scale * q.scale.to(torch.float32)).squeeze(1)
        folded = -offset.to(torch.float64) * q.weight.sum(1, dtype=torch.int64)
        if q.bias is not None:
            folded = folded + q.bias.to(torch.float64) / deq_scale.to(torch.float64)
        folded = folded.round()
        if not bool((folded.abs() < 2**31).all()):
            raise ValueError(
                "cannot pack as W8A8: a bias is too large for 32 bits on the grid of its channel"
            )
        bits = deq_scale.view(torch.int32).to(torch.int64)
        return cls._floats(q, dtype) | {
            "weight": q.weight.contiguous(),
            "input_scale": scale.to(dtype),
            "input_offset": offset.to(torch.int8),
            "quant_bias": folded.to(torch.int32),
            "deq_scale": bits if dtype == torch.float16 else deq_scale,
        }

    def rows(self, x: Tensor) -> Tensor:
        """float64 [rows, out] of float [rows, in], with the bias."""
        return static_rows(self, x)


def static_rows(linear: IntegerLinear, x: Tensor) -> Tensor:
    """float64 [rows, out] of float [rows, in] on the stored scale, with the bias: the integers may need 32 bits."""
    reciprocal = linear.get_buffer("input_scale").reciprocal().to(torch.float32)
    offset = linear.get_buffer("input_offset").to(torch.float32)
    integers = (x.to(torch.float32) * reciprocal + offset).round_().clamp_(-128, 127).to(torch.int8)
    deq_scale = linear.get_buffer("deq_scale")
    if deq_scale.dtype == torch.int64:
        deq_scale = deq_scale.to(torch.int32).view(torch.float32)
    total = int_matmul(integers, linear.weight) + linear.get_buffer("quant_bias")
    return total.to(torch.float64) * deq_scale.to(torch.float64)
