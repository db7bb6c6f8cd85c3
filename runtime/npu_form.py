"""The forms in which the NPU takes what a linear stores."""

from __future__ import annotations

import torch
from torch import Tensor


def expanded(value: Tensor, width: int) -> Tensor:
    """One value [1] as a vector [width] with memory of its own."""
    return value.expand(width).clone()


def one_scale(weight_scale: Tensor, name: str) -> Tensor:
    """A scale per channel [out, 1] as [out]. ValueError for groups, for which ``qc::name`` has no NPU op."""
    if weight_scale.shape[-1] != 1:
        raise ValueError(
            f"qc::{name}: the NPU has no op for {weight_scale.shape[-1]} groups of input channels"
        )
    return weight_scale.view(-1)


def no_offset(weight_offset: Tensor | None, name: str) -> None:
    """ValueError for a weight with offsets beside integer activations, for which ``qc::name`` has no NPU op."""
    if weight_offset is not None:
        raise ValueError(
            f"qc::{name}: the NPU has no op for offsets of a weight beside integer activations (where all are zero,"
            " call prepare_for_npu() of the module first)"
        )


def packed(weight: Tensor, name: str) -> Tensor:
    """An int4 weight that is packed, of ``qc::name``. ValueError for one that is stored as on disk."""
    if weight.dtype != torch.int32:
        raise ValueError(
            f"qc::{name}: the NPU takes a packed int4 weight: call prepare_for_npu() of the module first"
        )
    return weight
