"""Linears with int8 weights and int8 activations, on a scale per token or on one fixed by calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from .int_matmul import int_matmul
from .linear import IntegerLinear
from .npu_form import expanded, no_offset, one_scale
from .op import NPU_DTYPES, define, flat, unflat
from .product import finish, product
from .quantize import quantize_per_tensor, quantize_per_token
from .quantized import QuantizedLinear


def _dynamic(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor | None, bias: Tensor | None
) -> Tensor:
    return finish(product(*quantize_per_token(flat(x), 8), weight, weight_scale, weight_offset), bias, x)


def _dynamic_npu(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor | None, bias: Tensor | None
) -> Tensor:
    no_offset(weight_offset, "w8a8_dynamic")
    integers, scale = torch.ops.npu.npu_dynamic_quant(flat(x))
    y = torch.ops.npu.npu_quant_matmul(
        integers,
        weight.t(),
        one_scale(weight_scale, "w8a8_dynamic"),
        pertoken_scale=scale,
        bias=bias,
        output_dtype=NPU_DTYPES[x.dtype],
    )
    return unflat(y, x)


def _tensor(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor | None, bias: Tensor | None
) -> Tensor:
    return finish(product(*quantize_per_tensor(flat(x), 8), weight, weight_scale, weight_offset), bias, x)


def _tensor_npu(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor | None, bias: Tensor | None
) -> Tensor:
    no_offset(weight_offset, "w8a8_dynamic_tensor")
    integers, scale = torch.ops.npu.npu_dynamic_quant(flat(x), quant_mode="pertensor")
    y = torch.ops.npu.npu_quant_matmul(
        integers,
        weight.t(),
        one_scale(weight_scale, "w8a8_dynamic_tensor"),
        pertoken_scale=scale.expand(integers.shape[0]),
        bias=bias,
        output_dtype=NPU_DTYPES[x.dtype],
    )
    return unflat(y, x)


def _dynamic_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor | None, bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_ARGUMENTS = "Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_offset, Tensor? bias"
W8A8_DYNAMIC = define(
    f"w8a8_dynamic({_ARGUMENTS}) -> Tensor", kernel=_dynamic, fake=_dynamic_fake, npu=_dynamic_npu
)
"""``x ((weight + weight_offset) * weight_scale)ᵀ + bias``, with x in int8 on a scale per token.

x float [..., in], weight int8 [out, in], weight_scale and weight_offset [out, groups], bias [out]: [..., out] in the
dtype of x.
"""
W8A8_DYNAMIC_TENSOR = define(
    f"w8a8_dynamic_tensor({_ARGUMENTS}) -> Tensor", kernel=_tensor, fake=_dynamic_fake, npu=_tensor_npu
)
"""The same with x in int8 on one scale for all of it."""


def _static(
    x: Tensor, weight: Tensor, reciprocal: Tensor, offset: Tensor, quant_bias: Tensor, deq_scale: Tensor
) -> Tensor:
    rows = flat(x).to(torch.float32) * reciprocal.to(torch.float32)
    integers = rows.add_(offset.to(torch.float32)).round_().clamp_(-128, 127).to(torch.int8)
    if deq_scale.dtype == torch.int64:
        deq_scale = deq_scale.to(torch.int32).view(torch.float32)
    total = int_matmul(integers, weight).add_(quant_bias)
    # the sums may need 32 bits, so their product with the scale is rounded once, from float64
    return unflat(total.to(torch.float64).mul_(deq_scale).to(x.dtype), x)


def _static_npu(
    x: Tensor, weight: Tensor, reciprocal: Tensor, offset: Tensor, quant_bias: Tensor, deq_scale: Tensor
) -> Tensor:
    integers = torch.ops.npu.npu_quantize(
        flat(x), reciprocal, offset, NPU_DTYPES[torch.qint8], -1, div_mode=False
    )
    y = torch.ops.npu.npu_quant_matmul(
        integers, weight.t(), deq_scale, bias=quant_bias, output_dtype=NPU_DTYPES[x.dtype]
    )
    return unflat(y, x)


def _static_fake(
    x: Tensor, weight: Tensor, reciprocal: Tensor, offset: Tensor, quant_bias: Tensor, deq_scale: Tensor
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


W8A8_STATIC = define(
    "w8a8_static(Tensor x, Tensor weight, Tensor input_reciprocal, Tensor input_offset, Tensor quant_bias,"
    " Tensor deq_scale) -> Tensor",
    kernel=_static,
    fake=_static_fake,
    npu=_static_npu,
)
"""``(q weightᵀ + quant_bias) * deq_scale`` of ``q = round(x * input_reciprocal + input_offset)`` within int8.

x [..., in]; the reciprocal and the offset are [1], or [in] in the dtype of x, as the NPU takes them; quant_bias int32
[out]; deq_scale float32 [out], or its bits as int64.
"""


class W8A8Dynamic(IntegerLinear):
    """int8 per output channel (or group), int8 per token: ``npu_dynamic_quant`` and ``npu_quant_matmul``."""

    type = "W8A8_DYNAMIC"
    weight_bits = 8
    act_bits = 8
    adds_bias = True

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``qc::w8a8_dynamic``."""
        return W8A8_DYNAMIC(x, self.weight, self.scale, self.offset, bias)


class W8A8DynamicTensor(IntegerLinear):
    """int8 per output channel (or group or tensor), int8 on one scale for all tokens of a call, found while it runs.

    What a token becomes depends on the tokens that are run with it. Source: SmoothQuant O2 (arXiv 2211.10438).
    """

    type = "W8A8_DYNAMIC_TENSOR"
    weight_bits = 8
    act_bits = 8
    act_scope = "dynamic-tensor"
    adds_bias = True

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``qc::w8a8_dynamic_tensor``."""
        return W8A8_DYNAMIC_TENSOR(x, self.weight, self.scale, self.offset, bias)


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

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``qc::w8a8_static``, with the bias that is stored in integers."""
        return static(self, x)

    def _prepare(self) -> None:
        super()._prepare()
        prepare_static(self)


def static(linear: IntegerLinear, x: Tensor) -> Tensor:
    """``qc::w8a8_static`` of the tensors of a linear."""
    scale = linear.get_buffer("input_scale")
    reciprocal = scale if linear.prepared else scale.reciprocal()
    return W8A8_STATIC(
        x,
        linear.weight,
        reciprocal,
        linear.get_buffer("input_offset"),
        linear.get_buffer("quant_bias"),
        linear.get_buffer("deq_scale"),
    )


def prepare_static(linear: IntegerLinear) -> None:
    """Turn the input's scale into its reciprocal, and it and the offset into vectors of the model's dtype."""
    scale, offset = linear.get_buffer("input_scale"), linear.get_buffer("input_offset")
    linear.input_scale = expanded(scale.reciprocal(), linear.in_features)
    linear.input_offset = expanded(offset.to(scale.dtype), linear.in_features)
