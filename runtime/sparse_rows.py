"""The op of a sparse matrix of float weights, stored row by row (CSR), beside a linear of integers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .op import define, flat, unflat


def sparse(start: Tensor, columns: Tensor, values: Tensor, in_features: int) -> Tensor:
    """The sparse matrix [out, in], float32, coalesced COO."""
    return torch.sparse_coo_tensor(
        torch.stack([_rows(start, columns), columns.long()]), values.float(), (len(start) - 1, in_features),
        is_coalesced=True, check_invariants=True,
    )  # fmt: skip


def _rows(start: Tensor, columns: Tensor) -> Tensor:
    """The row of every value."""
    rows = torch.arange(start.shape[0] - 1, device=start.device)
    return torch.repeat_interleave(rows, start.long().diff(), output_size=columns.shape[0])


def _product(x: Tensor, start: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    matrix = sparse(start, columns, values, x.shape[-1])
    return unflat(torch.sparse.mm(matrix, flat(x).float().T).T.contiguous(), x)


def _product_npu(x: Tensor, start: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Through the dense matrix, in plain torch: there is no such op."""
    dense = values.new_zeros((start.shape[0] - 1, x.shape[-1]), dtype=torch.float32)
    return F.linear(x.float(), dense.index_put((_rows(start, columns), columns.long()), values.float()))


def _product_fake(x: Tensor, start: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], start.shape[0] - 1), dtype=torch.float32)


SPARSE_ROWS = define(
    "sparse_rows(Tensor x, Tensor start, Tensor columns, Tensor values) -> Tensor",
    kernel=_product,
    fake=_product_fake,
    npu=_product_npu,
)
"""``x Sᵀ`` in float32 of x [..., in] and the sparse matrix S [out, in].

Row i has the values from ``start[i]`` up to ``start[i + 1]``, int [out + 1], in their ``columns``, int [count].
"""
