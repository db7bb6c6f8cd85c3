"""Regions: which ops of a part are drawn as one box, found by dataflow.

An op joins the box of its readers where all of them are in one box; a box so has one way out, and joining makes no
cycle. Leaves, attentions, products of matrices and what a pass inserted keep a box of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ...runtime.attention_grid import GRIDS
from ...runtime.divided import divided
from ...runtime.kronecker import rotate
from ...runtime.low_rank import low_rank
from ..canon import op_name, symbolic
from ..experts import COMBINED, ROUTED
from ..laws import EVERYTHING, LAYOUT, is_attention
from ..program import Part, Program
from .alike import alike_experts

aten = torch.ops.aten
INSERTED = (rotate, divided, low_rank)
"""Functions that passes put into a graph and that run with the model."""
STUBS = tuple(GRIDS.values())
MATRIX_PRODUCTS = frozenset(
    {"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "linear", "convolution", "conv1d", "stretch"}
)
THROUGH = frozenset({*LAYOUT, *EVERYTHING} - {aten.neg.default})
"""Ops that hand values on as they are: views, copies, casts. Alone, with one operand, they are drawn as an arrow."""


@dataclass(frozen=True)
class Region:
    """Nodes of a part that are one box, in graph order; the last one is what others read."""

    nodes: tuple[fx.Node, ...]

    @property
    def root(self) -> fx.Node:
        """The node that it ends in."""
        return self.nodes[-1]

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of its ops that do more than hand values on, in order."""
        return tuple(
            op_name(node) for node in self.nodes if node.op == "call_function" and not _hands_on(node)
        )


def regions(program: Program, part: Part, *, whole: bool = True) -> tuple[Region, ...]:
    """The boxes of a part, in graph order.

    Args:
        program: A program.
        part: One of its parts.
        whole: False gives every node a region of its own.
    """
    nodes = [node for node in program.nodes(part) if not symbolic(node)]
    owner: dict[fx.Node, fx.Node] = _alike(program, part)
    for node in reversed(nodes):
        if node not in owner:
            owner[node] = _owner(program, part, node, owner) if whole else node
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(owner[node], []).append(node)
    found = [Region(tuple(group)) for group in members.values()]
    place = {node: i for i, node in enumerate(nodes)}
    return tuple(sorted(found, key=lambda region: place[region.root]))


def _alike(program: Program, part: Part) -> dict[fx.Node, fx.Node]:
    """Nodes of experts that have no rows, each with the last node of its stretch of alike experts."""
    stretches: list[list[fx.Node]] = []
    for node, stands_for in alike_experts(program, part).items():
        if stands_for is not None:
            stretches.append([])
        stretches[-1].append(node)
    return {node: group[-1] for group in stretches for node in group}


def _owner(program: Program, part: Part, node: fx.Node, owner: dict[fx.Node, fx.Node]) -> fx.Node:
    if _stands_alone(program, node):
        return node
    readers = [user for user in node.users if not symbolic(user)]
    if not readers or any(user.meta["part"] != part.index for user in readers):
        return node
    (first, *others) = dict.fromkeys(owner[user] for user in readers)
    if others or first.op == "output":
        return node
    if node.op == "get_attr":
        return first
    return first if not _stands_alone(program, first) else node


def _stands_alone(program: Program, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return False
    return (
        node.op != "call_function"
        or is_attention(node)
        or node.target in (*INSERTED, *STUBS, ROUTED, COMBINED)
        or op_name(node) in MATRIX_PRODUCTS
        or any(source.target is low_rank for source in node.all_input_nodes)
    )


def _hands_on(node: fx.Node) -> bool:
    return node.target in THROUGH


def sources(region: Region) -> tuple[fx.Node, ...]:
    """Values that a region reads, each once, in order."""
    own = set(region.nodes)
    return tuple(
        dict.fromkeys(
            source
            for node in region.nodes
            for source in node.all_input_nodes
            if source not in own and not symbolic(source)
        )
    )


def arrow_only(region: Region) -> bool:
    """Whether a region only hands on the one value that it reads."""
    return (
        all(node.op == "call_function" and _hands_on(node) for node in region.nodes)
        and len(sources(region)) == 1
    )


def rotary(ops: Iterable[str]) -> bool:
    """Whether ops are those of rope with halves apart: x cos + [-x₂, x₁] sin."""
    return sorted(ops) == ["add", "cat", "mul", "mul", "neg"]
