"""Experts that are alike: rows of a listing print them once, as it prints layers that are alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from ..canon import spell
from ..experts import COMBINED, ROUTED
from ..program import Part, Program


@dataclass(frozen=True)
class Alike:
    """Experts ``first`` to ``last`` of a mixture, which do what the one before them does."""

    first: int
    last: int

    def __str__(self) -> str:
        return (
            f"experts {self.first} .. {self.last} alike"
            if self.last > self.first
            else f"expert {self.first} alike"
        )


def alike_experts(program: Program, part: Part) -> dict[fx.Node, Alike | None]:
    """The nodes of a part that need no row of their own: the first of each run with what it stands for."""
    hidden: dict[fx.Node, Alike | None] = {}
    order = {node: i for i, node in enumerate(program.nodes(part))}
    for node in order:
        if node.target is COMBINED:
            for run, nodes in _runs(program, node, order):
                ordered = sorted(nodes, key=order.__getitem__)
                hidden |= dict.fromkeys(ordered) | {ordered[0]: run}
    return hidden


def _runs(
    program: Program, combined: fx.Node, order: dict[fx.Node, int]
) -> Iterator[tuple[Alike, list[fx.Node]]]:
    ys = combined.args[2]
    assert isinstance(ys, list | tuple)
    first, before, nodes = 0, "", list[fx.Node]()
    for expert, y in enumerate(ys):
        assert isinstance(y, fx.Node)
        own = _of_expert(y, order)
        text = _text(program, own)
        if expert and text == before:
            nodes += own
            continue
        if nodes:
            yield Alike(first + 1, expert - 1), nodes
        first, before, nodes = expert, text, []
    if nodes:
        yield Alike(first + 1, len(ys) - 1), nodes


def _of_expert(y: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node]:
    """What runs between the rows that are sent to an expert and its result, in graph order."""
    seen: set[fx.Node] = set()
    queue = [y]
    while queue:
        node = queue.pop()
        if node in seen or node not in order:
            continue
        seen.add(node)
        if node.target is not ROUTED:
            queue += node.all_input_nodes
    return sorted(seen, key=order.__getitem__)


def _text(program: Program, nodes: list[fx.Node]) -> str:
    """What an expert does, without its number."""
    spelled: dict[fx.Node, str] = {}
    lines = []
    for node in nodes:
        leaf = program.leaf(node)
        args = node.args[:2] if node.target is ROUTED else node.args
        said = f"{leaf.kind} {dict(leaf.parameters)} {leaf.norm}" if leaf is not None else ""
        words = ", ".join(spell(a, spelled) for a in (*args, *node.kwargs.values()))
        spelled[node] = f"v{len(lines)}"
        target = re.sub(r"\.\d+\b", ".N", str(node.target))
        lines.append(
            f"{node.op} {target}({words}) {said} {node.meta.get('edits', '')} {node.meta.get('note', '')}"
        )
    return "\n".join(lines)
