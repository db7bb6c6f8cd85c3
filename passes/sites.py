"""What passes ask about a module in a program: its widths, its block, the linears of a block."""

from __future__ import annotations

from collections.abc import Sequence

from ..compiler.program import Program
from ..compiler.roles import routers
from ..compiler.scheme import matches


def width_in(program: Program, linear: str) -> int:
    """Number of input channels of a linear."""
    leaf = program.leaves[linear]
    return leaf.parameters["weight"][0 if leaf.transposed else 1]


def width_out(program: Program, linear: str) -> int:
    """Number of output channels of a linear."""
    leaf = program.leaves[linear]
    return leaf.parameters["weight"][1 if leaf.transposed else 0]


def block_linears(program: Program) -> dict[str, int]:
    """The linears inside blocks that may be quantized, in graph order, with the index of their part.

    Routers are not among them (``compiler.roles.routers``).
    """
    blocks, left = {part.index for part in program.blocks}, routers(program)
    return {
        str(node.target): node.meta["part"]
        for node in program.graph.nodes
        if (leaf := program.leaf(node)) is not None and leaf.kind == "linear" and node.meta["part"] in blocks
        if str(node.target) not in left
    }


def chosen(program: Program, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Those of them that globs choose."""
    return [name for name in block_linears(program) if matches(name, include) and not matches(name, exclude)]
