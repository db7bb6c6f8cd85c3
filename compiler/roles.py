"""Roles that linears play in the dataflow, for schemes and targets to choose by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from . import registry
from .experts import COMBINED, ROUTED
from .flow import feeding
from .laws import shape
from .operand import Outliers
from .program import Program


def roles_of(program: Program) -> Mapping[str, frozenset[str]]:
    """Module names per role.

    ``gated``: writers of a gated product, both of them. ``row_parallel``: readers of a gated product or of an
    attention and the last of an expert, whose input channels a tensor-parallel server splits. ``expert``:
    linears of a mixture of experts.
    ``router``: linears that say where rows go or how much they count, see ``routers``.
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
    expert = mixtures(program)
    row_parallel |= {linears[0] for mixture in expert for linears in mixture if linears}
    return {
        "gated": frozenset(gated),
        "row_parallel": frozenset(row_parallel),
        "expert": frozenset(name for mixture in expert for linears in mixture for name in linears),
        "router": routers(program),
    }


def mixtures(program: Program) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """For each mixture the linears of each expert, the same place of all experts in the same order."""
    if "mixtures" not in program.memory:
        program.memory["mixtures"] = tuple(
            tuple(_of_expert(program, y) for y in _experts(node))
            for node in program.graph.nodes
            if node.target is COMBINED
        )
    return program.memory["mixtures"]


def _experts(combined: fx.Node) -> list[fx.Node]:
    ys = combined.args[2]
    assert isinstance(ys, list | tuple)
    return [y for y in ys if isinstance(y, fx.Node)]


def _of_expert(program: Program, y: fx.Node) -> tuple[str, ...]:
    """The linears between the rows that are sent to an expert and what it makes of them, last first."""
    seen: dict[fx.Node, None] = {}
    queue = [y]
    while queue:
        node = queue.pop(0)
        if node not in seen and node.target is not ROUTED:
            seen[node] = None
            queue += node.all_input_nodes
    leaves = ((node, program.leaf(node)) for node in seen)
    return tuple(str(node.target) for node, leaf in leaves if leaf is not None and leaf.kind == "linear")


def peers(found: Iterable[tuple[tuple[str, ...], ...]]) -> dict[str, tuple[str, ...]]:
    """For each linear of an expert the linears in the same place of all experts of its mixture, itself included."""
    return {name: place for mixture in found for place in zip(*mixture, strict=False) for name in place}


def routers(program: Program) -> frozenset[str]:
    """Linears that stay float: a small error there sends a row elsewhere, and there is next to nothing to gain.

    They are those from which the choice and the weights of experts are computed, those with one output channel, a
    number per row, and those that are only a part of their module.
    """
    if "routers" not in program.memory:
        found: set[str] = set()
        for node in program.graph.nodes:
            leaf = program.leaf(node)
            if node.target is COMBINED:
                for operand in node.args[:2]:
                    found |= {str(linear.target) for linear in feeding(program, operand)}
            elif leaf is not None and leaf.kind == "linear" and (leaf.partial or shape(node)[-1] == 1):
                found.add(str(node.target))
        program.memory["routers"] = frozenset(found)
    return program.memory["routers"]


def read_together(program: Program) -> Mapping[str, tuple[str, ...]]:
    """For each linear, the linears that read the same value, itself included, in graph order.

    Behind an online rotation too, and without outlier channels, where those are the same.
    """
    if "together" in program.memory:
        return program.memory["together"]
    readers: dict[object, list[str]] = {}
    for node in program.graph.nodes:
        leaf = program.leaf(node)
        if leaf is not None and leaf.kind == "linear":
            value = node.args[0]
            if "rotated" in node.meta:
                assert isinstance(value, fx.Node)
                value = (value.args[0], node.meta["rotated"])
            elif isinstance(node.meta.get("branch"), Outliers):
                assert isinstance(value, fx.Node)
                value = (value.args[0], node.meta["branch"])
            readers.setdefault(value, []).append(str(node.target))
    program.memory["together"] = {name: tuple(group) for group in readers.values() for name in group}
    return program.memory["together"]
