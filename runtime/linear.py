"""IntegerLinear: what the quantized linears share, a weight of integers and the tensors that go with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .beside import Beside
from .kronecker import rotate
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
    What stands in float beside the integers is added to it.
    """

    type: ClassVar[str]  # pyright: ignore[reportIncompatibleMethodOverride]
    """The ascendv1 type string."""
    weight_bits: ClassVar[int]
    act_bits: ClassVar[int | None]
    """None where activations stay float."""
    act_scope: ClassVar[str | None] = "token"
    """What shares one scale of the activation: ``token``, ``dynamic-tensor`` (all tokens of a call), ``tensor`` (the
    scale is stored), ``mix`` (per token and stored, by phase); None where activations stay float."""
    rotated: ClassVar[bool] = False
    """Whether an online rotation comes before the activation is quantized."""
    packed: ClassVar[bool] = False
    """Whether two int4 share a byte on disk."""
    grouped: ClassVar[bool] = True
    """Whether the weight's scales may be per group of input channels."""
    offsets: ClassVar[bool] = True
    """Whether the weight may have offsets; what is stored is the negative of ``QuantizedLinear.offset``."""
    adds_bias: ClassVar[bool] = False
    """Whether the op adds the bias before it rounds; else it is added to what the op returns, as the server does."""
    prepared: bool = False
    """Whether the tensors are in the form that the NPU takes, and no longer in that on disk."""
    _has_offsets: bool = True

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
        beside: Beside | None = None,
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
        self.rotation, self.beside = rotation, beside
        stored = {**self.tensors(bias), **self.rotation_tensors(), **self.float_tensors()}
        for name, (kind, shape) in stored.items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))

    weight: Tensor
    bias: Tensor | None
    rotation: tuple[str, int, int] | None = None
    """An online rotation of the reference tool before it: ``heads`` or ``kronecker``, and the sizes of its factors."""
    beside: Beside | None = None
    """What of the linear is computed in float."""

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

    def float_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name to (dtype, shape) of what stands beside the integers."""
        if self.beside is None:
            return {}
        return self.beside.tensors(self.in_features, self.out_features, self.dtype)

    @property
    def stored_type(self) -> str:
        """The type string of its tensors on disk: ``W8A8_DYNAMIC``, ``W8A8_DYNAMIC_SVD``."""
        return self.type + (self.beside.suffix if self.beside is not None else "")

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
        return packed | cls._floats(q, dtype)

    @classmethod
    def _floats(cls, q: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is stored beside the integers: float parts, and factors of an online rotation of the reference tool.

        A rotation over heads has one factor: it leaves channels alone.
        """
        floats = dict(q.beside)
        if q.online is not None:
            given = zip(ROTATIONS[q.online], (q.left, q.right), strict=False)
            floats |= {name: factor for name, factor in given if factor is not None}
        return {n: (t.to(dtype) if t.is_floating_point() else t).contiguous() for n, t in floats.items()}

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
            "there is no place for an offset of the weight": not cls.offsets and q.offset is not None,
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
        x, beside, bias = self.turned(x), self.beside, self.added_bias
        inside = bias if self.adds_bias and beside is None else None
        y = self.compute(x if beside is None else beside.rest(x, self.get_buffer), inside)
        if beside is not None:
            y = (y + beside.product(x, self.get_buffer)).to(y.dtype)
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
        self._look_at_offsets()

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._look_at_offsets()

    def _look_at_offsets(self) -> None:
        """Find out once, and not in every call, whether all are zero."""
        stored = self._buffers.get("weight_offset") if self.offsets else None
        self._has_offsets = stored is not None and (stored.is_meta or bool(stored.any()))

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

    @property
    def offset(self) -> Tensor | None:
        """What the op adds to the weight's integers, as it is stored: float32 [out, groups].

        None where there is no place for it, or where zeros were loaded.
        """
        return self.get_buffer("weight_offset") if self.offsets and self._has_offsets else None

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        group = f", group_size={self.group_size}" if self.group_size else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{group}, type={self.type}"
