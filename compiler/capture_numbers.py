"""Tensors that a model's code makes of numbers: on meta their values would be lost, so each becomes ops that say them.

``torch.tensor(-1e9, device=x.device)`` is a tensor without values when ``x`` is on meta. While a model is traced it is
``torch.full`` instead, which the graph holds with its number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

MOST = 64
"""How many numbers may be written into a graph one by one."""


class KeptNumbers(TorchFunctionMode):
    """``torch.tensor`` and ``torch.as_tensor`` of numbers become ``torch.full``; ``x[..., [i]]`` is a slice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and args and _is_meta(kwargs.get("device")):
            numbers = pytree.tree_leaves(args[0])
            if len(numbers) <= MOST and all(isinstance(n, bool | int | float) for n in numbers):
                return _full(args[0], kwargs.get("dtype"))
        if func is Tensor.__getitem__:
            return func(args[0], _sliced(args[1]))
        return func(*args, **kwargs)


def _is_meta(device: Any) -> bool:
    device = torch.get_default_device() if device is None else torch.device(device)
    return device.type == "meta"


def _sliced(index: Any) -> Any:
    """An index in which a list of one number, its only list or tensor, is the slice that takes the same."""
    parts = index if isinstance(index, tuple) else (index,)
    lists = [part for part in parts if isinstance(part, list | Tensor)]
    if (
        len(lists) != 1
        or not isinstance(lists[0], list)
        or len(lists[0]) != 1
        or type(lists[0][0]) is not int
    ):
        return index
    i = lists[0][0]
    return tuple(slice(i, i + 1 or None) if part is lists[0] else part for part in parts)


def _full(data: Any, dtype: torch.dtype | None) -> Tensor:
    """The tensor of nested lists of numbers, [*sizes of the lists], made of full and stack."""
    dtype = dtype or torch.tensor(data, device="cpu").dtype
    if isinstance(data, list | tuple):
        if not data:
            return torch.empty(0, dtype=dtype, device="meta")
        return torch.stack([_full(part, dtype) for part in data])
    return torch.full((), data, dtype=dtype, device="meta")
