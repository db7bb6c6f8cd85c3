"""A low-rank branch beside a linear: what of its weight is kept in float."""

from __future__ import annotations

from torch import Tensor

FACTORS = ("svd_lowrank_l1", "svd_lowrank_l2")
"""Names of the factors beside the tensors of a linear: [rank, in] and [out, rank]."""
SUFFIX = "_SVD"
"""What the type string of a linear ends in that has such a branch."""


def low_rank(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``L2 L1 x`` for x [..., in], L1 [rank, in] and L2 [out, rank]: [..., out] in the dtype of x."""
    return (x @ first.to(x.dtype).T) @ second.to(x.dtype).T
