"""ReLU and powers: activations through which a positive scale passes, to a power."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .laws import op_name

aten = torch.ops.aten
ACTIVATIONS = frozenset({
    aten.relu.default, aten.relu_.default, aten.pow.Tensor_Scalar, aten.square.default, aten.mul.Tensor,
    aten.clamp.default, aten.clamp_min.default,
})  # fmt: skip
"""Ops that may be one; ``degree`` says whether a node is."""


def degree(node: fx.Node) -> int | None:
    """n where ``f(s x) = sⁿ f(x)`` for every s > 0 and the one value x that a node reads; None for other nodes."""
    args: tuple[Any, ...] = node.args
    name = op_name(node)
    if name in ("aten.relu", "aten.relu_"):
        return 1
    if name in ("aten.clamp", "aten.clamp_min"):
        low, high = args[1] if len(args) > 1 else None, args[2] if len(args) > 2 else None
        return 1 if low == 0 and high is None else None
    if name == "aten.square" or (name == "aten.mul" and args[0] is args[1]):
        return 2
    if name == "aten.pow" and isinstance(args[1], int | float) and args[1] == int(args[1]) and args[1] >= 1:
        return int(args[1])
    return None


def power_of(crossed: list[fx.Node]) -> int | None:
    """The power to which a scale comes out of nodes in a row; None where none of them is an activation."""
    degrees = [
        found for node in crossed if node.target in ACTIVATIONS and (found := degree(node)) is not None
    ]
    if not degrees:
        return None
    total = 1
    for one in degrees:
        total *= one
    return total
