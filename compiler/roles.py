"""Roles that linears play in the dataflow, for schemes and targets to choose by."""

from __future__ import annotations

from collections.abc import Mapping

from . import registry
from .program import Program


def roles_of(program: Program) -> Mapping[str, frozenset[str]]:
    """Module names per role.

    ``gated``: writers of a gated product, both of them. ``row_parallel``: readers of a gated product or of an
    attention, whose input channels a tensor-parallel server splits. ``expert``: linears of a mixture of experts.
    """
    if "roles" not in program.memory:
        program.memory["roles"] = _roles_of(program)
    return program.memory["roles"]


def _roles_of(program: Program) -> Mapping[str, frozenset[str]]:
    gated: set[str] = set()
    row_parallel: set[str] = set()
    for match in registry.get("patterns", "up_down").find(program):
        gated |= {match.up.module, *(site.module for site in match.gate_writers)}
        row_parallel.add(match.down.module)
    for match in registry.get("patterns", "ov").find(program):
        row_parallel.add(match.o.module)
    return {"gated": frozenset(gated), "row_parallel": frozenset(row_parallel), "expert": frozenset()}


def read_together(program: Program) -> Mapping[str, tuple[str, ...]]:
    """For each linear, the linears that read the same value, itself included, in graph order."""
    if "together" in program.memory:
        return program.memory["together"]
    readers: dict[object, list[str]] = {}
    for node in program.graph.nodes:
        leaf = program.leaf(node)
        if leaf is not None and leaf.kind == "linear":
            readers.setdefault(node.args[0], []).append(str(node.target))
    program.memory["together"] = {name: tuple(group) for group in readers.values() for name in group}
    return program.memory["together"]
