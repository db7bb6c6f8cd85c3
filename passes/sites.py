"""What passes ask about a module in a program: its widths, its block, the linears of a block."""

from __future__ import annotations

from ..compiler.program import Program


def width_in(program: Program, linear: str) -> int:
    """Number of input channels of a linear."""
    leaf = program.leaves[linear]
    return leaf.parameters["weight"][0 if leaf.transposed else 1]


def width_out(program: Program, linear: str) -> int:
    """Number of output channels of a linear."""
    leaf = program.leaves[linear]
    return leaf.parameters["weight"][1 if leaf.transposed else 0]


def block_linears(program: Program) -> dict[str, int]:
    """The linears inside blocks, in graph order, with the index of their part."""
    blocks = {part.index for part in program.blocks}
    return {
        str(node.target): node.meta["part"]
        for node in program.graph.nodes
        if (leaf := program.leaf(node)) is not None and leaf.kind == "linear" and node.meta["part"] in blocks
    }
