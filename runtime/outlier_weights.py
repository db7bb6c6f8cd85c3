"""Outlier weights beside a linear: single weights in float, the integers zero there, as a sparse matrix (CSR)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .beside import Beside, Held
from .sparse_rows import SPARSE_ROWS

CSR = ("outlier_start", "outlier_column", "outlier_value")
"""Names of the tensors beside those of a linear: where each row begins [out + 1], columns and values [count]."""
SHORT = 2**15
"""Widths up to here have columns of 16 bits."""


def to_csr(mask: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The entries of a weight [out, in] where ``mask`` is true, row by row, in the form in which they are stored."""
    rows, columns = mask.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(mask))
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return dict(zip(CSR, (start, columns.to(_index(mask.shape[1])), weight[rows, columns]), strict=True))


@dataclass(frozen=True)
class OutlierWeights(Beside):
    """``count`` single weights in the dtype of the model. Source: SpQR (arXiv 2306.03078), section 4."""

    count: int
    suffix = "_SPQR"
    leaves = CSR

    @classmethod
    def of_share(cls, share: float, weights: int) -> OutlierWeights:
        """A share of all weights of a linear, to the nearest whole number."""
        return cls(round(share * weights))

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> OutlierWeights:
        """From the number of values."""
        if len(shapes.get(CSR[2], ())) != 1:
            raise ValueError(f"{CSR[2]} is missing or has not one axis")
        return cls(shapes[CSR[2]][0])

    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """int32 [out + 1], int16 [count] (int32 for inputs of more than 32,768 channels), values [count]."""
        shapes = (
            (torch.int32, (out_features + 1,)), (_index(in_features), (self.count,)), (dtype, (self.count,)),
        )  # fmt: skip
        return dict(zip(CSR, shapes, strict=True))

    def product(self, x: Tensor, held: Held) -> Tensor:
        """The sparse matrix times x, in float32."""
        return SPARSE_ROWS(x, *map(held, CSR))

    def wrong(self, leaf: str, tensor: Tensor, in_features: int) -> str:
        """Rows begin in order and end with the last value; columns lie inside."""
        if leaf == CSR[0] and (
            tensor[0] != 0 or int(tensor[-1]) != self.count or bool((tensor.diff() < 0).any())
        ):
            return f"rows do not begin at 0, in order, and end at {self.count}"
        if leaf == CSR[1] and bool(((tensor < 0) | (tensor >= in_features)).any()):
            return f"columns are 0 to {in_features - 1}"
        return ""

    def __str__(self) -> str:
        return "outlier weights"


def _index(in_features: int) -> torch.dtype:
    return torch.int16 if in_features <= SHORT else torch.int32
