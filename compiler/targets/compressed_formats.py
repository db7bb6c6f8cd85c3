"""Linears as the library compressed-tensors stores them, made from the integers that qc's passes find.

A module here holds names, dtypes and shapes on disk and packs; the library runs what was packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime.linear import IntegerLinear
from ...runtime.quantized import QuantizedLinear
from ...runtime.w8a8 import W8A8, W8A8Dynamic
from ...runtime.weight_only import W4A16, W8A16


class Compressed(IntegerLinear):
    """What the formats share: scales in the dtype of the model, and no offsets of symmetric weights."""

    def tensors(self, bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """int-quantized: one integer a byte."""
        groups = self.in_features // self.group_size if self.group_size else 1
        stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (torch.int8, (self.out_features, self.in_features)),
            "weight_scale": (self.dtype, (self.out_features, groups)),
        }
        return {**stored, "bias": (self.dtype, (self.out_features,))} if bias else stored

    @classmethod
    def scale_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """That of the model: the library casts scales to it."""
        return dtype

    @classmethod
    def pack(cls, q: QuantizedLinear, dtype: torch.dtype, row_parallel: bool = False) -> dict[str, Tensor]:
        """The tensors on disk. ValueError as for every format."""
        cls._check(q, dtype)
        if q.offset is not None:
            raise ValueError(f"cannot pack as {cls.type}: weights are symmetric")
        packed = {"weight": q.weight.contiguous(), "weight_scale": q.scale.to(dtype).contiguous()}
        return packed if q.bias is None else {**packed, "bias": q.bias.to(dtype)}


class CompressedW8A8(Compressed, W8A8Dynamic):
    """int8 per channel, int8 per token."""


class CompressedW4A8(CompressedW8A8):
    """int4 per channel or group, one a byte; int8 per token."""

    type = "W4A8_DYNAMIC"
    weight_bits = 4


class CompressedStatic(Compressed, W8A8):
    """int8 per channel, int8 per tensor on a scale from calibration, zero point zero."""

    def tensors(self, bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """With the scale of the input."""
        return {**super().tensors(bias), "input_scale": (self.dtype, (1,))}

    @classmethod
    def pack(cls, q: QuantizedLinear, dtype: torch.dtype, row_parallel: bool = False) -> dict[str, Tensor]:
        """The tensors on disk. ValueError as for every format."""
        packed = super().pack(q, dtype, row_parallel)
        assert q.input_scale is not None, "checked"
        return {**packed, "input_scale": q.input_scale.reshape(1).to(dtype)}


class CompressedStaticAsymmetric(CompressedStatic):
    """The same with a zero point."""

    def tensors(self, bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """With scale and zero point of the input."""
        return {**super().tensors(bias), "input_zero_point": (torch.int8, (1,))}

    @classmethod
    def pack(cls, q: QuantizedLinear, dtype: torch.dtype, row_parallel: bool = False) -> dict[str, Tensor]:
        """The tensors on disk. ValueError as for every format."""
        packed = super().pack(q, dtype, row_parallel)
        assert q.input_offset is not None, "checked"
        return {**packed, "input_zero_point": q.input_offset.reshape(1).to(torch.int8)}


class PackedW8A16(Compressed, W8A16):
    """Float activations: integers packed densely into int32, by the library's own function."""

    def tensors(self, bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """pack-quantized: 32 integers in as many int32 as each has bits."""
        stored = super().tensors(bias)
        del stored["weight"]
        words = -(-self.in_features * self.weight_bits // 32)
        packed: dict[str, Any] = {
            "weight_packed": (torch.int32, (self.out_features, words)),
            "weight_shape": (torch.int64, (2,)),
        }
        return packed | stored

    @classmethod
    def pack(cls, q: QuantizedLinear, dtype: torch.dtype, row_parallel: bool = False) -> dict[str, Tensor]:
        """The tensors on disk. ValueError as for every format."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        packed = super().pack(q, dtype, row_parallel)
        return {
            "weight_packed": pack_to_int32(packed.pop("weight"), cls.weight_bits).contiguous(),
            "weight_shape": torch.tensor(q.weight.shape, dtype=torch.int64),
            **packed,
        }


class PackedW4A16(PackedW8A16, W4A16):
    """int4 per channel or group, eight in an int32."""

    type = "W4A16"
    weight_bits = 4
