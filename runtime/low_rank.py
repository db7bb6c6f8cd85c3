"""A low-rank branch beside a linear: what of its weight is kept in float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .beside import Beside, Held

FACTORS = ("svd_lowrank_l1", "svd_lowrank_l2")
"""Names of the factors beside the tensors of a linear: [rank, in] and [out, rank]."""


def low_rank(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``L2 L1 x`` for x [..., in], L1 [rank, in] and L2 [out, rank]: [..., out] in the dtype of x."""
    return (x @ first.to(x.dtype).T) @ second.to(x.dtype).T


@dataclass(frozen=True)
class LowRankBranch(Beside):
    """Two factors in the dtype of the model, whose product was taken off the weight; they read what the integers do."""

    rank: int
    suffix = "_SVD"
    leaves = FACTORS

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> LowRankBranch:
        """From the rows of the first factor."""
        return cls(_side(shapes, FACTORS[0], 0))

    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """[rank, in] and [out, rank]."""
        shapes = (self.rank, in_features), (out_features, self.rank)
        return {name: (dtype, shape) for name, shape in zip(FACTORS, shapes, strict=True)}

    def product(self, x: Tensor, held: Held) -> Tensor:
        """``L2 L1 x``."""
        return low_rank(x, *map(held, FACTORS))

    def __str__(self) -> str:
        return "a low-rank branch"


def _side(shapes: Mapping[str, tuple[int, ...]], leaf: str, axis: int) -> int:
    """The size of an axis; ValueError where there is no such tensor or axis."""
    if len(shapes.get(leaf, ())) <= axis:
        raise ValueError(f"{leaf} is missing or has too few axes")
    return shapes[leaf][axis]
