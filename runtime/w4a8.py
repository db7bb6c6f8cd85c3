"""Linears with int4 weights, packed in pairs, and int8 activations: how experts of mixtures are served in four bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import IntegerLinear
from .op import NPU_DTYPES, define, flat, unflat
from .product import finish, product
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


def _outputs(weight: Tensor) -> int:
    """Output channels of a weight: pairs int8 [out / 2, in], or words int32 [in, out / 8]."""
    return 8 * weight.shape[1] if weight.dtype == torch.int32 else 2 * weight.shape[0]


def _kernel(x: Tensor, weight: Tensor, weight_scale: Tensor, scale_bias: Tensor) -> Tensor:
    if weight.dtype == torch.int32:
        weight, weight_scale = weight.view(torch.int8).t(), weight_scale.to(torch.int32).view(torch.float32)
    y = product(*quantize_per_token(flat(x), 8), unpack_pairs(weight), weight_scale.view(-1, 1))
    return finish(y, None, x)


def _npu(x: Tensor, weight: Tensor, weight_scale: Tensor, scale_bias: Tensor) -> Tensor:
    if weight.dtype != torch.int32:
        raise ValueError(
            "qc::w4a8_dynamic: the NPU takes words of int4: call prepare_for_npu() of the module first"
        )
    integers, scale = torch.ops.npu.npu_dynamic_quant(flat(x))
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [integers],
        [weight.unsqueeze(0)],
        bias=[scale_bias.view(1, -1)],
        scale=[weight_scale.view(1, 1, -1)],
        per_token_scale=[scale],
        group_list=integers.new_full(
            (1,), integers.shape[0], dtype=torch.int64
        ),  # one expert, and all rows are its
        split_item=2,
        group_type=0,
        group_list_type=1,
        output_dtype=NPU_DTYPES[x.dtype],
    )
    return unflat(y, x)


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, scale_bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], _outputs(weight)))


W4A8_DYNAMIC = define(
    "w4a8_dynamic(Tensor x, Tensor weight, Tensor weight_scale, Tensor scale_bias) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    npu=_npu,
)
"""x float [..., in]; int4 weight in pairs, int8 [out / 2, in], with weight_scale [out, 1] and scale_bias [out, shares].

As the NPU takes it: words int32 [in, out / 8], bits of the scale int64 [out], scale_bias float32 [out]. The bias is
what the NPU needs to take off again; the integers of the kernel have a sign, so it does not.
"""


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

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``qc::w4a8_dynamic``."""
        return W4A8_DYNAMIC(x, self.weight, self.scale, self.get_buffer("scale_bias"))

    def _prepare(self) -> None:
        if self.out_features % 8:
            raise ValueError(
                f"{self.type}: {self.out_features} outputs do not fill words of 8, as the NPU needs"
            )
        self.weight_scale = self.scale.view(-1).view(torch.int32).to(torch.int64)
        self.scale_bias = self.get_buffer("scale_bias").sum(1)
        self.weight = self.weight.t().contiguous().view(torch.int32)
