"""Linears whose weight alone is an integer: the activation stays float."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu_units import has_units
from .int4_pack import as_int4, pack_int4
from .linear import IntegerLinear
from .npu_form import packed
from .op import define, flat, unflat
from .product import finish

FEW_ROWS = 16
"""Up to so many rows, torch's kernel for int8 weights is faster than making the weight bfloat16."""


def _kernel(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor, bias: Tensor | None
) -> Tensor:
    rows, weight, scale = flat(x), as_int4(weight), weight_scale.to(torch.float32)
    one = scale.shape[-1] == 1
    if one and x.dtype == torch.bfloat16 and x.device.type == "cpu" and not weight_offset.any():
        return finish(_bfloat16(rows, weight, scale), bias, x)
    wide, offset = weight.to(torch.float32), weight_offset.to(torch.float32)
    if one:
        y = (rows.to(torch.float32) @ wide.add_(offset).t()).mul_(scale.t())
    else:
        grouped = wide.view(*scale.shape, -1).add_(offset.unsqueeze(2)).mul_(scale.unsqueeze(2))
        y = rows.to(torch.float32) @ grouped.view(wide.shape).t()
    return finish(y, bias, x)


def _bfloat16(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """bfloat16 [rows, in] times the integers, which are exact in it, then the scale; float32 [rows, out]."""
    if rows.shape[0] <= FEW_ROWS and weight.is_contiguous():
        ones = scale.new_ones(weight.shape[0], dtype=torch.bfloat16)
        y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), weight, ones)
    elif has_units("bf16"):
        y = rows @ weight.to(torch.bfloat16).t()
    else:
        y = rows.to(torch.float32) @ weight.to(torch.float32).t()
    return y.to(torch.float32).mul_(scale.t())


def _fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _npu(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor, bias: Tensor | None
) -> Tensor:
    groups = weight_scale.shape[-1]
    flatten = (lambda held: held.view(-1)) if groups == 1 else (lambda held: held.t())
    y = torch.ops.npu.npu_weight_quant_batchmatmul(
        flat(x),
        weight.t(),
        flatten(weight_scale),
        antiquant_offset=flatten(weight_offset),
        bias=bias,
        antiquant_group_size=x.shape[-1] // groups if groups > 1 else 0,
    )
    return unflat(y, x)


def _npu_int4(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor, bias: Tensor | None
) -> Tensor:
    return _npu(x, packed(weight, "w4a16"), weight_scale, weight_offset, bias)


_ARGUMENTS = "Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_offset, Tensor? bias"
W8A16_OP = define(f"w8a16({_ARGUMENTS}) -> Tensor", kernel=_kernel, fake=_fake, npu=_npu)
"""``x @ ((weight + weight_offset) * weight_scale)ᵀ + bias`` of x [..., in], int8 [out, in] and scales [out, groups]."""
W4A16_OP = define(f"w4a16({_ARGUMENTS}) -> Tensor", kernel=_kernel, fake=_fake, npu=_npu_int4)
"""The same with int4, one in a byte of int8 [out, in] or eight in a word of int32 [out, in / 8]."""


class W8A16(IntegerLinear):
    """int8 weight per output channel or group, float activation: ``npu_weight_quant_batchmatmul``.

    The op adds the offset, (weight + offset) * scale: what is stored is the negative of ``QuantizedLinear.offset``.
    """

    type = "W8A16"
    weight_bits = 8
    act_bits = None
    act_scope = None
    adds_bias = True
    op = W8A16_OP

    @property
    def offset(self) -> Tensor:
        """The weight's offset with the values that the server's copy of it has, float32 [out, groups]."""
        stored = self.get_buffer("weight_offset")
        return stored if self.prepared else stored.to(self.dtype).to(torch.float32)

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``qc::w8a16``, or ``qc::w4a16``."""
        return self.op(x, self.weight, self.scale, self.offset, bias)

    def _prepare(self) -> None:
        """Scales take the dtype of the model; the bias of a bfloat16 one becomes float32, which the op asks for."""
        scale, offset = self.scale.to(self.dtype), self.offset.to(self.dtype)
        self.weight_scale, self.weight_offset = scale, offset
        if self.bias is not None and self.dtype == torch.bfloat16:
            self.bias = self.bias.to(torch.float32)


class W4A16(W8A16):
    """As W8A16 with integers in -8..7, one a byte. No server registers the type; the layout can say it."""

    type = "W4A16"
    weight_bits = 4
    op = W4A16_OP

    def _prepare(self) -> None:
        """The int4 are packed as well."""
        super()._prepare()
        self.weight = pack_int4(self.weight)
