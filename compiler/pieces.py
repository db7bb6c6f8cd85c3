"""Pieces: the weight of a linear is edited some rows or some columns at a time, so that float64 takes little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

PIECE = 2**22
"""Weights that are computed at once; a matrix that has no more is not cut."""

Tensors = dict[str, Tensor]
E = TypeVar("E")


def runs(edits: Iterable[E], axis_of: Callable[[E], int | None]) -> Iterator[tuple[int | None, list[E]]]:
    """Edits that follow one another and cut a weight along the same axis; None does not let it be cut."""
    return ((axis, list(some)) for axis, some in groupby(edits, axis_of))


def on_pieces(tensors: Tensors, axis: int | None, change: Callable[[Tensors], None]) -> None:
    """``change`` the tensors of a linear, its weight [out, in] by rows (axis 0) or by columns (axis 1), in place.

    A piece of rows comes with their part of the bias, the first piece of columns with all of it. What a change adds
    beside weight and bias is the same for every piece.
    """
    weight = tensors.get("weight")
    if axis is None or weight is None or weight.dim() != 2 or weight.numel() <= PIECE:
        change(tensors)
        return
    step = max(1, PIECE // weight.shape[1 - axis])
    biases: list[Tensor] = []
    for start in range(0, weight.shape[axis], step):
        part = slice(start, start + step)
        piece = weight[part] if axis == 0 else weight[:, part]
        given = {"weight": piece}
        if "bias" in tensors and (axis == 0 or start == 0):
            given["bias"] = tensors["bias"][part] if axis == 0 else tensors["bias"]
        change(given)
        piece.copy_(given.pop("weight"))
        if (bias := given.pop("bias", None)) is not None:
            biases.append(bias)
        tensors.update(given)
    if biases:
        tensors["bias"] = torch.cat(biases)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor with the values that ``dtype`` holds, in its own dtype; a large one is changed in place."""
    if tensor.numel() <= PIECE:
        return tensor.to(dtype).to(tensor.dtype)
    for piece in tensor.view(-1).split(PIECE):
        piece.copy_(piece.to(dtype))
    return tensor
