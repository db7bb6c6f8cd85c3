"""Importing this defines every op of the namespace ``qc`` that a quantized linear, norm or cache runs."""

from __future__ import annotations

import torch

from . import cache_ops, norm, sparse_rows, w4a4, w4a8, w8a8, weight_only
from .op import decompositions as decompositions

MODULES = (cache_ops, norm, sparse_rows, w4a4, w4a8, w8a8, weight_only)
"""Where they are defined."""


def npu_known() -> bool:
    """Whether schemas of torch_npu are registered in this process, so that bodies can take the place of ops."""
    return hasattr(torch.ops.npu, "npu_quant_matmul")
