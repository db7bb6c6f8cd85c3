"""IntegerLinear: what the quantized linears share, a weight of integers and the tensors that go with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from .kronecker import rotate
from .low_rank import FACTORS, low_rank
from .quantized import QuantizedLinear

ROTATIONS = {
    "heads": ("heads_rotation",),
    "kronecker": ("kronecker_rotation_m", "kronecker_rotation_n"),
}
"""Online rotations of the reference tool, with the names of their factors on disk."""


class IntegerLinear(nn.Module, ABC):
    """A linear whose ``state_dict`` is exactly its tensors in an ascendv1 checkpoint: names, dtypes, shapes.

    A subclass says in ``tensors`` what it stores; buffers of that kind are allocated (they may live on meta)
    and filled by ``load_state_dict``. ``forward`` is one op of the namespace ``qc``, whose arithmetic is the
    NPU's: exact integer sums, float32 scales, one rounding to the dtype of the input, float [..., in_features].
    """

    type: ClassVar[str]  # pyright: ignore[reportIncompatibleMethodOverride]
    """The ascendv1 type string."""
    weight_bits: ClassVar[int]
    act_bits: ClassVar[int | None]
    """None where activations stay float."""
    act_scope: ClassVar[str | None] = "token"
    """What shares one scale of the activation: ``token``, ``tensor`` (the scale is stored), ``mix`` (both, by
    phase); None where activations stay float."""
    rotated: ClassVar[bool] = False
    """Whether an online rotation comes before the activation is quantized."""
    packed: ClassVar[bool] = False
    """Whether two int4 share a byte on disk."""
    grouped: ClassVar[bool] = True
    """Whether the weight's scales may be per group of input channels."""
    adds_bias: ClassVar[bool] = False
    """Whether the op adds the bias before it rounds; else it is added to what the op returns, as the server does."""
    prepared: bool = False
    """Whether the tensors are in the form that the NPU takes, and no longer in that on disk."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        group_size: int = 0,
        device: torch.device | str | None = None,
        rotation: tuple[str, int, int] | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__()
        if group_size and (not self.grouped or in_features % group_size):
            why = (
                f"does not divide {in_features} channels"
                if self.grouped
                else "is not possible: one per channel"
            )
            raise ValueError(f"{self.type}: a weight scale per group of {group_size} {why}")
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.group_size = dtype, group_size
        self.register_buffer("bias", None)
        self.rotation, self.rank = rotation, rank
        stored = {**self.tensors(bias), **self.rotation_tensors(), **self.branch_tensors()}
        for name, (kind, shape) in stored.items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))

    weight: Tensor
    bias: Tensor | None
    rotation: tuple[str, int, int] | None = None
    """An online rotation of the reference tool before it: ``heads`` or ``kronecker``, and the sizes of its factors."""
    rank: int = 0
    """Rank of the float branch beside it; 0 for none."""

    def tensors(self, bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name to (dtype, shape) of everything stored; the bias, when present, is in the model's dtype."""
        groups = self.in_features // self.group_size if self.group_size else 1
        stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (torch.int8, (self.out_features, self.in_features)),
            "weight_scale": (torch.float32, (self.out_features, groups)),
            "weight_offset": (torch.float32, (self.out_features, groups)),
        }
        if bias:
            stored["bias"] = (self.dtype, (self.out_features,))
        return stored

    def rotation_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name to (dtype, shape) of the factors of ``rotation``."""
        if self.rotation is None:
            return {}
        kind, *sizes = self.rotation
        return {name: (self.dtype, (size, size)) for name, size in zip(ROTATIONS[kind], sizes, strict=False)}

    def branch_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name to (dtype, shape) of the factors of a low-rank branch."""
        shapes = (self.rank, self.in_features), (self.out_features, self.rank)
        return {name: (self.dtype, shape) for name, shape in zip(FACTORS, shapes, strict=True) if self.rank}

    @classmethod
    def scale_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the server holds the weight's scale, for a model of ``dtype``."""
        return dtype

    @classmethod
    def pack(cls, q: QuantizedLinear, dtype: torch.dtype, row_parallel: bool = False) -> dict[str, Tensor]:
        """The tensors on disk of one linear of a model of ``dtype``.

        ``row_parallel``: whether a tensor-parallel server splits its input channels.

        ValueError where the integers or scales cannot be stored without changing them, or where ``q`` carries
        what this format has no place for.
        """
        cls._check(q, dtype)
        packed = {
            "weight": q.weight.contiguous(),
            "weight_scale": q.scale.to(torch.float32).contiguous(),
            "weight_offset": torch.zeros_like(q.scale) if q.offset is None else -q.offset.to(torch.float32),
        }
        if q.bias is not None:
            packed["bias"] = q.bias.to(dtype)
        branch = q.branch or ()
        factors = {name: factor.to(dtype) for name, factor in zip(FACTORS, branch, strict=False)}
        return packed | cls._factors(q, dtype) | factors

    @classmethod
    def _factors(cls, q: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
        """The stored factors of an online rotation of the reference tool; those over heads leave channels alone."""
        if q.online is None:
            return {}
        given = zip(ROTATIONS[q.online], (q.left, q.right), strict=False)
        return {name: factor.to(dtype).contiguous() for name, factor in given if factor is not None}

    @classmethod
    def _check(cls, q: QuantizedLinear, dtype: torch.dtype) -> None:
        out, width = q.weight.shape
        top = 2 ** (cls.weight_bits - 1)
        groups = q.scale.shape[-1]
        stored = cls.act_scope in ("tensor", "mix")
        held = q.scale.to(cls.scale_dtype(dtype)).to(q.scale.dtype)
        problems = {
            "the weight must be int8": q.weight.dtype != torch.int8,
            f"integers lie outside -{top}..{top - 1}": int(q.weight.min()) < -top
            or int(q.weight.max()) >= top,
            f"the scale must be [{out}, groups]": q.scale.dim() != 2 or q.scale.shape[0] != out,
            f"{groups} scales per channel do not fit": groups > 1 and (not cls.grouped or width % groups > 0),
            "scales must be finite and above zero": not bool((q.scale.isfinite() & (q.scale > 0)).all()),
            f"round the scales to {cls.scale_dtype(dtype)} before computing integers": not held.equal(
                q.scale
            ),
            "an input scale and offset are needed": stored
            and (q.input_scale is None or q.input_offset is None),
            "there is no place for an input scale": not stored and q.input_scale is not None,
            "a left and a right factor are needed": cls.rotated and (q.left is None or q.right is None),
            "there is no place for an online rotation": not cls.rotated
            and q.online is None
            and (q.left is not None or q.right is not None),
            "there is no place for an offset of the weight": cls.act_bits is not None
            and q.offset is not None,
            "there is no place for a clip ratio": not cls.rotated and q.clip != 1.0,
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(f"cannot pack a {out} x {width} linear as {cls.type}: {problem}")

    @property
    def integers(self) -> Tensor:
        """The weight as int8 [out, in], however it is stored."""
        return self.weight

    @abstractmethod
    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The op of this format: [..., in_features] to [..., out_features] in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features] in the dtype of x."""
        x = self.turned(x)
        bias = self.added_bias
        inside = bias if self.adds_bias and not self.rank else None
        y = self.compute(x, inside)
        if self.rank:
            y = y + low_rank(x, *(self.get_buffer(name) for name in FACTORS))
        if bias is inside:
            return y
        return y + (bias if bias.dtype == y.dtype else bias.to(y.dtype))

    def prepare_for_npu(self) -> Self:
        """Bring the tensors into the form in which ``torch_npu`` takes them: what the NPU bodies of the ops need.

        Done once, in place; what is computed stays the same. int4 weights are packed, eight to an int32, scales
        are rounded as the server rounds them. ``state_dict`` is no longer that on disk, and cannot be loaded again.
        """
        if not self.prepared:
            self._prepare()
            self.prepared = True
        return self

    def _prepare(self) -> None:
        if "weight_scale" in self._buffers:
            self.weight_scale = self.scale

    def turned(self, x: Tensor) -> Tensor:
        """x [..., in_features] behind ``rotation``."""
        if self.rotation is None:
            return x
        kind, left, right = self.rotation
        matrix = self.get_buffer(ROTATIONS[kind][0]).to(x.dtype)
        if kind == "heads":
            return (matrix.T @ x.reshape(-1, left, right)).reshape(x.shape)
        return rotate(x, matrix, self.get_buffer(ROTATIONS[kind][1]))

    @property
    def added_bias(self) -> Tensor | None:
        """The float bias [out_features] that the output still needs."""
        return self.bias

    @property
    def scale(self) -> Tensor:
        """The weight's scale with the values that the server's copy of it has, float32 [out, groups]."""
        stored, held = self.get_buffer("weight_scale"), self.scale_dtype(self.dtype)
        return stored if self.prepared or held == torch.float32 else stored.to(held).to(torch.float32)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        group = f", group_size={self.group_size}" if self.group_size else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{group}, type={self.type}"
