"""Linears with int4 weights, packed in pairs, and int8 activations: how experts of mixtures are served in four bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import IntegerLinear
from .quantize import quantize_per_token
from .quantized import QuantizedLinear

SHARES = 16
"""Equal stretches of input channels of which a row-parallel linear stores sums: the most ranks that can split it."""


def pack_pairs(integers: Tensor) -> Tensor:
    """int8 [out, in] of -8..7 to int8 [out / 2, in]: row 2i in the low half of byte i, row 2i + 1 in the high half."""
    low, high = integers[0::2].to(torch.int16), integers[1::2].to(torch.int16)
    return ((low & 15) | (high << 4)).to(torch.uint8).view(torch.int8)


def unpack_pairs(packed: Tensor) -> Tensor:
    """Invert ``pack_pairs``: int8 [out / 2, in] to int8 [out, in]."""
    low, high = (packed << 4) >> 4, packed >> 4  # shifts of int8 keep the sign
    return torch.stack((low, high), dim=1).flatten(0, 1)


def sums(integers: Tensor, scale: Tensor, shares: int) -> Tensor:
    """8 * the sum over each of ``shares`` stretches of inputs of the weight, float32 [out, shares].

    The server's kernel multiplies nibbles as unsigned numbers, 8 too large, and takes this off again.
    """
    stretches = integers.unflatten(1, (shares, -1)).sum(-1, dtype=torch.int64)
    return (8 * stretches.double() * scale.double()).float()


class W4A8Dynamic(IntegerLinear):
    """int4 per output channel, int8 per token: ``npu_dynamic_quant``, then ``npu_grouped_matmul``.

    Args:
        row_parallel: Whether a tensor-parallel server splits its input channels: ``scale_bias`` is then kept
            for each of 16 stretches of them.
    """

    type = "W4A8_DYNAMIC"
    weight_bits = 4
    act_bits = 8
    packed = True
    grouped = False
    offsets = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        group_size: int = 0,
        device: torch.device | str | None = None,
        row_parallel: bool = False,
    ) -> None:
        if out_features % 2:
            raise ValueError(f"{self.type}: outputs are packed in pairs, and there are {out_features}")
        if row_parallel and in_features % SHARES:
            raise ValueError(f"{self.type}: {in_features} inputs are not {SHARES} equal stretches")
        self.shares = SHARES if row_parallel else 1
        super().__init__(
            in_features, out_features, bias=bias, dtype=dtype, group_size=group_size, device=device
        )

    def tensors(self, bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Those of every linear, two int4 in a byte, and ``scale_bias``."""
        return super().tensors(bias) | {
            "weight": (torch.int8, (self.out_features // 2, self.in_features)),
            "scale_bias": (torch.float32, (self.out_features, self.shares)),
        }

    @classmethod
    def scale_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """float32, whatever the model's dtype."""
        return torch.float32

    @classmethod
    def pack(cls, q: QuantizedLinear, dtype: torch.dtype, row_parallel: bool = False) -> dict[str, Tensor]:
        """The tensors on disk. ValueError as for every format, and where pairs or stretches do not come out even."""
        packed = super().pack(q, dtype)
        out, width = q.weight.shape
        if out % 2 or (row_parallel and width % SHARES):
            raise ValueError(
                f"cannot pack a {out} x {width} linear as {cls.type}: outputs go in pairs"
                + (f", inputs in {SHARES} equal stretches" if row_parallel else "")
            )
        shares = SHARES if row_parallel else 1
        return packed | {"weight": pack_pairs(q.weight), "scale_bias": sums(q.weight, q.scale, shares)}

    @property
    def integers(self) -> Tensor:
        """The weight, int8 [out, in]."""
        return unpack_pairs(self.weight)

    def rows(self, x: Tensor) -> Tensor:
        """float32 [rows, out] of float [rows, in]."""
        return self.product(*quantize_per_token(x, 8))
