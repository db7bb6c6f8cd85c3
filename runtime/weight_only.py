"""Linears whose weight alone is an integer: the activation stays float."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import IntegerLinear


class W8A16(IntegerLinear):
    """int8 weight per output channel or group, float activation: ``npu_weight_quant_batchmatmul``.

    The op adds the offset, (weight + offset) * scale: what is stored is the negative of ``QuantizedLinear.offset``.
    """

    type = "W8A16"
    weight_bits = 8
    act_bits = None
    act_scope = None

    def rows(self, x: Tensor) -> Tensor:
        """float32 [rows, out] of float [rows, in]."""
        offset = self.get_buffer("weight_offset").to(self.dtype).to(torch.float32)
        groups = self.scale.shape[1]
        weight = self.weight.to(torch.float32).unflatten(1, (groups, -1))
        if groups == 1:
            return x.to(torch.float32) @ (weight.squeeze(1) + offset).t() * self.scale.t()
        weight = (weight + offset.unsqueeze(2)) * self.scale.unsqueeze(2)
        return x.to(torch.float32) @ weight.flatten(1).t()


class W4A16(W8A16):
    """As W8A16 with integers in -8..7, one a byte. No server registers the type; the layout can say it."""

    type = "W4A16"
    weight_bits = 4
