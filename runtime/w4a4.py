"""Linears with int4 weights and int4 activations, without and with an online Kronecker rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from .kronecker import blocks, rotate, split
from .linear import IntegerLinear
from .quantize import dequantize, quantize_per_token
from .quantized import QuantizedLinear


class W4A4Dynamic(IntegerLinear):
    """int4 per output channel (or group), int4 per token; one int4 is one byte on disk.

    ``npu_dynamic_quant`` to quint4x2, then ``npu_quant_matmul``, whose output is float16 whatever the model's
    dtype: a value beyond 65,504 overflows here as it does there.
    """

    type = "W4A4_DYNAMIC"
    weight_bits = 4
    act_bits = 4

    @classmethod
    def scale_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """float32, whatever the model's dtype."""
        return torch.float32

    def rows(self, x: Tensor) -> Tensor:
        """[rows, out] in the dtype of x, by way of float16, of float [rows, in]."""
        return self.product(*quantize_per_token(x, 4)).to(torch.float16).to(x.dtype)


class W4A4FlatQuantDynamic(IntegerLinear):
    """int4 linear behind the online rotation Lᵀ X R: ``npu_kronecker_quant``, then ``npu_quant_matmul``.

    The factors have the sizes of the server's split of one rank's width; ``blocks`` ranks side by side make
    up ``in_features``, and each quantizes its own channels of a token with a scale of its own.
    """

    type = "W4A4_FLATQUANT_DYNAMIC"
    weight_bits = 4
    act_bits = 4
    rotated = True
    grouped = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        group_size: int = 0,
        device: torch.device | str | None = None,
        blocks: int = 1,
    ) -> None:
        if blocks < 1 or in_features % blocks:
            raise ValueError(f"{self.type}: {blocks} equal blocks do not make up {in_features} channels")
        self.blocks = blocks
        super().__init__(
            in_features, out_features, bias=bias, dtype=dtype, group_size=group_size, device=device
        )

    def tensors(self, bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Those of every int4 linear, the two factors in the model's dtype, and the clip ratio."""
        a, b = split(self.in_features // self.blocks)
        return super().tensors(bias) | {
            "left_trans": (self.dtype, (a, a)),
            "right_trans": (self.dtype, (b, b)),
            "clip_ratio": (torch.float32, (1,)),
        }

    @classmethod
    def scale_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """float32, whatever the model's dtype."""
        return torch.float32

    @classmethod
    def pack(cls, q: QuantizedLinear, dtype: torch.dtype, row_parallel: bool = False) -> dict[str, Tensor]:
        """The tensors on disk. ValueError as for every format, and for factors the server does not take."""
        packed = super().pack(q, dtype)
        assert q.left is not None, "checked"
        assert q.right is not None, "checked"
        width = q.weight.shape[1]
        sizes = (q.left.shape[0], q.right.shape[0])
        expected = split(width // blocks(width, q.left, q.right))
        if sizes != expected:
            raise ValueError(
                f"cannot pack as {cls.type}: factors of {sizes}, but the server splits into {expected}"
            )
        if not all(factor.to(dtype).to(factor.dtype).equal(factor) for factor in (q.left, q.right)):
            raise ValueError(f"cannot pack as {cls.type}: round the factors to {dtype} before folding them")
        if not 0 < q.clip <= 1:
            raise ValueError(f"cannot pack as {cls.type}: the clip ratio {q.clip} is not in (0, 1]")
        return packed | {
            "left_trans": q.left.to(dtype).contiguous(),
            "right_trans": q.right.to(dtype).contiguous(),
            "clip_ratio": torch.tensor([q.clip], dtype=torch.float32),
        }

    def rows(self, x: Tensor) -> Tensor:
        """float32 [rows, out] of float [rows, in]."""
        left, right = self.get_buffer("left_trans"), self.get_buffer("right_trans")
        turned = rotate(x.to(torch.float32), left, right).unflatten(-1, (self.blocks, -1))
        integers, scale = quantize_per_token(turned, 4, float(self.get_buffer("clip_ratio")))
        if self.blocks == 1:
            return self.product(integers.flatten(1), scale.flatten(1))
        weight = dequantize(self.weight, self.scale, self.offset)
        return (integers * scale).flatten(1) @ weight.t()
