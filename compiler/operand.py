"""Operands of edits: known ones are described and materialised when needed, unknown ones are slots to be solved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..runtime.hadamard import hadamard, has_hadamard, random_hadamard, random_orthogonal
from ..runtime.low_rank import LowRankBranch
from ..runtime.outlier_channels import OutlierChannels
from .scheme import LinearScheme


@dataclass(frozen=True)
class Statistic:
    """What has to be observed on calibration data: ``kind`` of the input of linear ``module``, per channel.

    ``module`` may be ``NODE:OPERAND`` too, q, k or v (0, 1, 2) of an attention as rows of all channels of all heads.
    """

    kind: str
    """A name of ``compiler.statistics.KINDS``: ``absmax``, ``range``, ``absmean``, ``meansquare``, ``rows``,
    ``histogram``; ``rows:N`` for so many."""
    module: str


@dataclass(frozen=True)
class Slot:
    """An unknown: a tensor of ``shape`` that ``Pass.solve`` computes from ``needs`` when weights are there."""

    name: str
    shape: tuple[int, ...]
    needs: tuple[Statistic, ...] = ()


@dataclass(frozen=True)
class Vector:
    """A slot as one value per channel of the site: ``1 / value`` where ``inverse``, each repeated for GQA.

    With ``groups`` = (kv heads, head_dim) and ``repeat`` = query heads per kv head, entry (j, c) of the slot
    goes to the heads j·repeat .. (j+1)·repeat - 1. With ``index``, ``groups`` is (kv heads, entries per head) and
    channel c of a head takes entry ``index[c]``.
    """

    slot: Slot
    inverse: bool = False
    groups: tuple[int, int] | None = None
    repeat: int = 1
    index: tuple[int, ...] | None = None
    power: float = 1.0
    """To which the values are taken: 0.5 before a square."""

    def value(self, values: Mapping[Slot, Tensor], dtype: torch.dtype) -> Tensor:
        """The vector, [channels of the site]."""
        vector = values[self.slot].to(dtype)
        if self.power != 1:
            vector = vector**self.power
        if self.groups is not None:
            heads = vector.view(self.groups)
            if self.index is not None:
                heads = heads[:, torch.tensor(self.index).to(heads.device)]
            vector = heads.repeat_interleave(self.repeat, dim=0).flatten()
        return 1 / vector if self.inverse else vector


@dataclass(frozen=True)
class Gain:
    """The gain of a norm as it is when the edit is applied (weight plus its offset), [channels], or its inverse."""

    norm: str
    offset: float
    inverse: bool = False


@dataclass(frozen=True)
class NormBias:
    """The bias of a norm as it is when the edit is applied, [channels]."""

    norm: str


@dataclass(frozen=True)
class Hadamard:
    """An orthogonal matrix Q = blockdiag(D · H / sqrt(n), ...) of ``copies`` equal blocks.

    H is the Hadamard matrix of ``order`` and D random signs drawn from ``seed`` by a private generator
    (QuaRot, arXiv 2404.00456, section 3). It is never stored: products use its Kronecker factors.

    With ``keeps_ones`` the block is B · D · Bᵀ · P instead: B = C · H / sqrt(n) with the signs C that make its first
    column constant, the first sign of D positive, P a random permutation. So Q · 1 = 1, as a LayerNorm needs
    (SliceGPT, arXiv 2401.15024, section 3, on what commutes with one), and Q is spread like a random rotation.
    """

    order: int
    seed: int
    copies: int = 1
    keeps_ones: bool = False

    @property
    def width(self) -> int:
        """Number of channels it acts on."""
        return self.order * self.copies

    def __str__(self) -> str:
        return (
            f"H{self.order}" + (f"x{self.copies}" if self.copies > 1 else "") + " centred" * self.keeps_ones
        )

    def times(self, x: Tensor) -> Tensor:
        """``x @ Q`` for x of shape [..., width]."""
        y = x.reshape(*x.shape[:-1], self.copies, self.order)
        signs = signs_of(self.order, self.seed).to(x)
        if not self.keeps_ones:
            return self._hadamard(y * signs).reshape(x.shape)
        signs, column = centred(signs), first_column(self.order).to(x)
        y = self._hadamard(self._hadamard(y * column) * signs, transposed=True) * column
        return y[..., permutation_of(self.order, self.seed).to(y.device)].reshape(x.shape)

    def times_transposed(self, x: Tensor) -> Tensor:
        """``x @ Qᵀ`` for x of shape [..., width]."""
        y = x.reshape(*x.shape[:-1], self.copies, self.order)
        signs = signs_of(self.order, self.seed).to(x)
        if not self.keeps_ones:
            return (self._hadamard(y, transposed=True) * signs).reshape(x.shape)
        signs, column = centred(signs), first_column(self.order).to(x)
        y = y[..., permutation_of(self.order, self.seed).argsort().to(y.device)]
        y = self._hadamard(self._hadamard(y * column) * signs, transposed=True) * column
        return y.reshape(x.shape)

    def _hadamard(self, y: Tensor, *, transposed: bool = False) -> Tensor:
        """``y @ H / sqrt(n)`` or ``y @ Hᵀ / sqrt(n)`` along the last axis, in two plain products."""
        left, right = (factor.to(y) for factor in factors(self.order))
        left, right = (left.T, right.T) if transposed else (left, right)
        z = y.reshape(*y.shape[:-1], left.shape[0], right.shape[0])
        z = ((z @ right).transpose(-1, -2) @ left).transpose(-1, -2)  # leftᵀ z right
        return z.reshape(y.shape) * self.order**-0.5


def centred(signs: Tensor) -> Tensor:
    """Signs of which the first is positive."""
    return torch.cat([signs[:1].abs(), signs[1:]])


@lru_cache(maxsize=16)
def first_column(order: int) -> Tensor:
    """The first column [order] of H, ±1, float64."""
    left, right = factors(order)
    return torch.kron(left[:, 0], right[:, 0])


@lru_cache(maxsize=16)
def permutation_of(order: int, seed: int) -> Tensor:
    """A random permutation [order], a function of (order, seed) alone."""
    return torch.randperm(order, generator=torch.Generator().manual_seed(seed + 1))


@lru_cache(maxsize=16)
def factors(order: int) -> tuple[Tensor, Tensor]:
    """H of ``order`` as ``left ⊗ right`` (±1, float64), ``right`` the largest power of two up to 256 that fits."""
    fitting = (2**k for k in range(9) if order % 2**k == 0)
    power = max(power for power in fitting if has_hadamard(order // power))
    return hadamard(order // power), hadamard(power)


@lru_cache(maxsize=16)
def signs_of(order: int, seed: int) -> Tensor:
    """Random signs [order], a function of (order, seed) alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (order,), generator=generator).double() * 2 - 1


@dataclass(frozen=True)
class Permutation:
    """Another order of the channels, as a rotation: channel i becomes channel ``slot[i]`` of those there were.

    ``slot`` is filled with whole numbers [channels], each of 0 .. channels - 1 once.
    """

    slot: Slot

    def __str__(self) -> str:
        return f"order of {self.slot.shape[0]}"

    def of(self, values: Mapping[Slot, Tensor]) -> Ordered:
        """The permutation that was found."""
        return Ordered(values[self.slot].long())


@dataclass(frozen=True, eq=False)
class Ordered:
    """A permutation P with the products that a rotation has."""

    order: Tensor

    def times(self, x: Tensor) -> Tensor:
        """``x @ P`` for x of shape [..., channels]."""
        return x[..., self.order]


@dataclass(frozen=True)
class Kronecker:
    """An online rotation: x[a, b] -> leftᵀ x right, on ``copies`` equal stretches of the channels.

    Both factors are described and drawn in float64, or slots that a pass solves; they are rounded to ``dtype``, the
    dtype in which they are stored and multiplied at run time, and the weight side uses the rounded factors.
    """

    left: int
    right: int
    seed: int
    dtype: torch.dtype
    copies: int = 1
    random: bool = False
    """Random orthogonal factors instead of Hadamard matrices."""
    layout: Literal["flatquant", "heads", "kronecker"] = "flatquant"
    """How it is stored: in the server's FlatQuant linear, or as the reference tool does; ``heads`` turns whole heads,
    so the right factor is one."""
    block: int = 0
    """Order of the equal diagonal blocks of the left factor; 0 for one block."""
    slots: tuple[Slot, ...] = ()
    """Left [left, left], right [right, right] and clip ratio [1] where they are learned: invertible, not orthogonal."""

    def __str__(self) -> str:
        kind = "random " if self.random else "learned " if self.slots else ""
        kind += "" if self.layout == "flatquant" else f"{self.layout} "
        return f"{kind}{self.left}x{self.right}" + (f" x{self.copies}" if self.copies > 1 else "")


@lru_cache(maxsize=16)
def stored_factors(rotation: Kronecker) -> tuple[Tensor, Tensor]:
    """The factors [left, left] and [right, right] as they are stored: rounded to ``rotation.dtype``, float64."""
    make = random_orthogonal if rotation.random else random_hadamard
    order = rotation.block or rotation.left
    left = torch.block_diag(*[make(order, rotation.seed)] * (rotation.left // order)).contiguous()
    right = torch.eye(rotation.right, dtype=torch.float64)
    if rotation.layout != "heads":
        right = make(rotation.right, rotation.seed + 1).contiguous()
    return left.to(rotation.dtype).double(), right.to(rotation.dtype).double()


def factors_of(rotation: Kronecker, values: Mapping[Slot, Tensor]) -> tuple[Tensor, Tensor]:
    """The factors as they are stored, whether drawn or learned: rounded to ``rotation.dtype``, float64."""
    if not rotation.slots:
        return stored_factors(rotation)
    left, right = (values[slot].to(rotation.dtype).double() for slot in rotation.slots[:2])
    return left, right


@dataclass(frozen=True)
class Quantize:
    """Replace a linear by a quantized one; ``slot`` is filled with its integers and scales."""

    scheme: LinearScheme
    slot: Slot
    weight_method: str = "minmax"
    """How its integers are found, in the words of the recipe language."""
    act_method: str = "minmax"
    """How the range of a static activation is found."""


@dataclass(frozen=True)
class Stub:
    """A place before an attention where q, k or v is put on an int8 grid.

    ``slot`` is filled with scale and offset, stacked [2, n]: n channels, heads, or 1 where the grid is found while the
    model runs.
    """

    node: str
    """The attention, by its name in the graph."""
    operand: int
    """0, 1 or 2: q, k or v."""
    kind: Literal["cache", "fa"]
    """What a cache keeps, or what a quantized attention reads."""
    scope: Literal["channel", "head", "token"]
    slot: Slot
    symmetric: bool = True

    def __str__(self) -> str:
        return f"int8/{self.scope}" + ("" if self.symmetric else "/asym")

    @property
    def leaves(self) -> tuple[str, str]:
        """Names of the scale and the offset below the module of the edit."""
        return ("kv_cache_scale", "kv_cache_offset") if self.kind == "cache" else ("scale", "offset")


@dataclass(frozen=True)
class LowRank:
    """A branch beside a linear: ``first`` L1 [rank, in] and ``second`` L2 [out, rank], rounded to ``dtype``."""

    first: Slot
    second: Slot
    dtype: torch.dtype

    @property
    def beside(self) -> LowRankBranch:
        """What it is when the model runs."""
        return LowRankBranch(self.first.shape[0])

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Both factors."""
        return self.first, self.second

    def __str__(self) -> str:
        return f"rank {self.beside.rank}"


@dataclass(frozen=True)
class Outliers:
    """Input channels of a linear that are computed in float: ``index`` int [places], -1 in places that are not used."""

    index: Slot
    dtype: torch.dtype
    """Of the model: the weights of those channels are stored in it."""

    @property
    def beside(self) -> OutlierChannels:
        """What it is when the model runs."""
        return OutlierChannels(self.index.shape[0])

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The index."""
        return (self.index,)

    def __str__(self) -> str:
        return f"up to {self.beside.places} channels"


Branch = LowRank | Outliers
"""What ``BRANCH`` puts beside a linear."""


@dataclass(frozen=True)
class Divisor:
    """Scales s [in] by which the input of a linear is divided online; stored as ``1 / s`` in ``dtype``."""

    slot: Slot
    dtype: torch.dtype


@dataclass(frozen=True)
class Weight:
    """A weight [out, in] in place of the one there is; ``type`` is what a description calls it."""

    slot: Slot
    type: str


Operand = (
    Vector
    | Gain
    | NormBias
    | Hadamard
    | Permutation
    | Kronecker
    | LowRank
    | Outliers
    | Divisor
    | Weight
    | Quantize
    | Stub
    | None
)
