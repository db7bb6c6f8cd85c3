"""Linears with int4 weights and int4 activations, without and with an online Kronecker rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from .int4_pack import as_int4, pack_int4
from .kronecker import blocks, rotate, split
from .linear import IntegerLinear
from .npu_form import no_offset, one_scale, packed
from .op import NPU_DTYPES, QUINT4X2, define, flat, unflat
from .product import finish, product, shifted
from .quantize import quantize_per_token
from .quantized import QuantizedLinear


def _dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor | None) -> Tensor:
    y = product(*quantize_per_token(flat(x), 4), as_int4(weight), weight_scale, weight_offset)
    return finish(y.to(torch.float16), None, x)


def _dynamic_npu(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor | None) -> Tensor:
    no_offset(weight_offset, "w4a4_dynamic")
    integers, scale = torch.ops.npu.npu_dynamic_quant(flat(x), dst_type=QUINT4X2)
    y = torch.ops.npu.npu_quant_matmul(
        integers,
        packed(weight, "w4a4_dynamic").t(),
        one_scale(weight_scale, "w4a4_dynamic"),
        pertoken_scale=scale,
        output_dtype=NPU_DTYPES[torch.float16],
    )
    return unflat(torch.ops.npu.npu_dtype_cast(y, NPU_DTYPES[x.dtype]), x)


def _dynamic_fake(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


W4A4_DYNAMIC = define(
    "w4a4_dynamic(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_offset) -> Tensor",
    kernel=_dynamic,
    fake=_dynamic_fake,
    npu=_dynamic_npu,
)
"""x float [..., in], weight int4 as int8 [out, in] or packed int32 [out, in / 8].

weight_scale [out, groups], and weight_offset of its shape, which is added to the integers.
"""


def _turned(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_offset: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip_ratio: float,
) -> Tensor:
    rows, weight = flat(x), as_int4(weight)
    count = blocks(rows.shape[-1], left, right)
    turned = rotate(rows.to(torch.float32), left, right).unflatten(-1, (count, -1))
    integers, scale = quantize_per_token(turned, 4, clip_ratio)
    if count == 1:
        y = product(integers.flatten(1), scale.flatten(1), weight, weight_scale, weight_offset)
    else:
        y = (integers * scale).flatten(1) @ shifted(weight, weight_scale, weight_offset).t()
    return finish(y, None, x)


def _turned_npu(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_offset: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip_ratio: float,
) -> Tensor:
    no_offset(weight_offset, "w4a4_flatquant")
    a, b = left.shape[0], right.shape[0]
    if x.shape[-1] != a * b:
        raise ValueError(
            f"qc::w4a4_flatquant: factors of {a} and {b} for {x.shape[-1]} channels: a rank has a linear of its own"
        )
    integers, scale = torch.ops.npu.npu_kronecker_quant(
        x.reshape(-1, a, b), left.t(), right, clip_ratio=clip_ratio, dst_dtype=NPU_DTYPES[torch.int32]
    )
    y = torch.ops.npu.npu_quant_matmul(
        integers.view(-1, a * b // 8),
        packed(weight, "w4a4_flatquant").t(),
        one_scale(weight_scale, "w4a4_flatquant"),
        pertoken_scale=scale.view(-1),
        output_dtype=NPU_DTYPES[x.dtype],
    )
    return unflat(y, x)


def _turned_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_offset: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip_ratio: float,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


W4A4_FLATQUANT = define(
    "w4a4_flatquant(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_offset, Tensor left, Tensor right,"
    " float clip_ratio) -> Tensor",
    kernel=_turned,
    fake=_turned_fake,
    npu=_turned_npu,
)
"""As ``w4a4_dynamic`` of Lᵀ X R, x [..., in] being read as X[a, b]; with n blocks of a * b each has its own scale."""


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

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``qc::w4a4_dynamic``."""
        return W4A4_DYNAMIC(x, self.weight, self.scale, self.offset)

    def _prepare(self) -> None:
        super()._prepare()
        self.weight = pack_int4(self.weight)


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
    _clip: float | None = None

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

    @property
    def clip(self) -> float:
        """The clip ratio. While a graph is traced, which sees no values, it is the one that was last read outside.

        RuntimeError where it never was.
        """
        if not torch.compiler.is_compiling():
            self._clip = float(self.get_buffer("clip_ratio"))
        if self._clip is None:
            raise RuntimeError(f"{self.type}: run the module once, or read its `clip`, before tracing it")
        return self._clip

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``qc::w4a4_flatquant``."""
        left, right = self.get_buffer("left_trans"), self.get_buffer("right_trans")
        return W4A4_FLATQUANT(x, self.weight, self.scale, self.offset, left, right, self.clip)

    def _prepare(self) -> None:
        super()._prepare()
        self.weight, self._clip = pack_int4(self.weight), self.clip
