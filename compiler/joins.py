"""Undo joins: values that are joined along their channels only to be taken apart again."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, fx

from .canon import aten, sweep
from .flow import constant_rows, copies
from .laws import shape

JOINS = (aten.cat.default, aten.stack.default)


def undo_joins(graph: fx.Graph) -> None:
    """Let who reads a piece of a join read what was joined, in place.

    Channels are followed from the join through views, slices and selections, as everywhere: a piece that
    holds exactly the channels of one operand, in their order, is that operand.
    """
    for join in [node for node in graph.nodes if node.target in JOINS]:
        operands = join.args[0]
        last = len(shape(join)) - 1
        if last == 0:
            continue  # numbers, not channels
        axis = join.args[1] if len(join.args) > 1 else 0
        if not isinstance(operands, list | tuple) or axis not in (-1, last):
            continue
        sizes = [shape(operand)[-1] for operand in operands if isinstance(operand, fx.Node)]
        if join.target is aten.stack.default:
            _replace(join, list(operands), _interleaved(sizes, join))
        else:
            starts = [0, *accumulate(sizes)]
            _replace(
                join, list(operands), [torch.arange(a, a + n) for a, n in zip(starts, sizes, strict=False)]
            )
    sweep(graph)


def _interleaved(sizes: list[int], join: fx.Node) -> list[Tensor]:
    """Channels of each operand in a stack along a new last axis, counted as they lie when it is flattened."""
    count = shape(join)[-1]
    return [torch.arange(i, sizes[0] * count, count) for i in range(count)]


def _replace(join: fx.Node, operands: list[fx.Node], channels: list[Tensor]) -> None:
    whole = _labels(join)
    for node, labels in list(copies(join, whole)):
        if node is join or not isinstance(labels, Tensor):
            continue
        rows = constant_rows(labels)
        for operand, own in zip(operands, channels, strict=True):
            if rows == tuple(own.tolist()) and shape(node) == shape(operand):
                node.replace_all_uses_with(operand)


def _labels(join: fx.Node) -> Tensor:
    """Labels of a join's channels as they lie in memory."""
    size = shape(join)
    if join.target is aten.stack.default:
        return torch.arange(size[-2] * size[-1]).view(size[-2:]).expand(size)
    return torch.arange(size[-1]).expand(size)
