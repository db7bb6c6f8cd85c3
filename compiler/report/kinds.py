"""Kinds of parts: those that are the same in every state of a program. One look at every node, whatever the depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from ..canon import spell
from ..program import Part, Program
from ..show.runs import Run


def kinds_of(programs: Sequence[Program]) -> list[list[Part]]:
    """The parts of the first program by kind, in the order in which kinds begin."""
    said = [_said(program) for program in programs]
    found: dict[object, list[Part]] = {}
    for part in programs[0].parts:
        key = (part.kind >= 0, *(tuple(one.get(part.index, ())) for one in said))
        found.setdefault(key, []).append(part)
    return list(found.values())


def runs_of(kinds: Sequence[Sequence[Part]]) -> list[Run]:
    """Parts one after the other of one kind, in order."""
    kind_of = {part.index: number for number, parts in enumerate(kinds) for part in parts}
    found: list[list[Part]] = []
    for part in sorted((part for parts in kinds for part in parts), key=lambda part: part.index):
        if found and kind_of[found[-1][-1].index] == kind_of[part.index]:
            found[-1].append(part)
        else:
            found.append([part])
    return [Run(tuple(parts)) for parts in found]


def _said(program: Program) -> dict[int, list[str]]:
    """By part, what each of its nodes is, with values numbered in the part and names without the part's own."""
    names = {part.index: f"{part.name}." for part in program.parts}
    spelled: dict[int, dict[fx.Node, str]] = {index: {} for index in names}
    found: dict[int, list[str]] = {index: [] for index in names}
    for node in program.graph.nodes:
        index = node.meta["part"]
        own, lines = spelled[index], found[index]
        for source in node.all_input_nodes:
            if source not in own:
                own[source] = f"in{len(own)}"
        leaf = program.leaf(node)
        held = f"{leaf.kind} {dict(leaf.parameters)} {leaf.norm}" if leaf is not None else ""
        words = ", ".join(spell(a, own) for a in (*node.args, *node.kwargs.values()))
        told = [str(node.meta.get(key, "")) for key in ("note", "edits", "scheme")]
        target = str(node.target).removeprefix(names[index])
        lines.append(f"{node.op} {target}({words}) {held} {_type(node.meta.get('val'))} {told}")
        own[node] = f"v{len(lines)}"
    return found


def _type(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else ""
