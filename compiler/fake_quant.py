"""The quantized model inside the float graph: linears on their integer grids, in the dtype of execution."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..runtime.kronecker import blocks
from ..runtime.quantize import dequantize, fake_quant_per_tensor, fake_quant_per_token, quantize
from ..runtime.quantized import QuantizedLinear
from .scheme import LinearScheme
from .view import LinearHook


def fake_act(x: Tensor, scheme: LinearScheme, q: QuantizedLinear) -> Tensor:
    """An activation [..., in] on the grid that the scheme gives it; its dtype is kept."""
    if scheme.act is None:
        return x
    if scheme.scope == "dynamic-tensor":
        return fake_quant_per_tensor(x, scheme.act.bits)
    if not scheme.static:  # a mix too: what is measured and trained on is prefill
        ranks = 1 if q.left is None or q.right is None else blocks(x.shape[-1], q.left, q.right)
        return fake_quant_per_token(x.unflatten(-1, (ranks, -1)), scheme.act.bits, q.clip).flatten(-2)
    assert q.input_scale is not None
    integers = quantize(x.float(), q.input_scale, scheme.act.bits, q.input_offset)
    return dequantize(integers, q.input_scale, q.input_offset).to(x.dtype)


def quantized_linears(
    quantized: Mapping[str, QuantizedLinear], schemes: Mapping[str, LinearScheme], dtype: torch.dtype
) -> LinearHook:
    """A hook that runs the linears of ``quantized`` on their grids, and the others as they are."""
    weights = {name: q.dense.to(dtype) for name, q in quantized.items()}

    def hook(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        q = quantized.get(name)
        if q is None:
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        bias = None if q.bias is None else q.bias.to(x.dtype)
        return F.linear(fake_act(x, schemes[name], q), weights[name].to(x.dtype), bias)

    return hook
