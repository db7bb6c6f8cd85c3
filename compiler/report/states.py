"""The states of a program along its plan: a drawing, the rows and their changes, for every kind of part."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..contract import Rewrite
from ..plan import Plan
from ..program import Part, Program
from ..show.block import block_diagram
from ..show.matched import Matched, matched
from ..show.rows import Sizes, rows
from ..show.runs import number_of, span
from ..show.svg import svg

MOST = 24
"""Kinds of parts that are drawn. A model with more of them has its rarest ones left out, and the page says so."""
MORE_REWRITES = 40
"""Rewrites of a part that are listed; a layer of experts has hundreds."""


def states_of(plan: Plan, entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """``parts``, each with its states, and ``drawings``, which the states name by number.

    Parts that have the same rows in every state are one. A part has ``title``, whether it is a ``block``, per state the
    number of its drawing, its ``text`` before all passes, and per pass its ``diffs`` and its ``rewrites``.
    """
    programs = [step.program for step in plan.steps] + [plan.final]
    sizes = [Sizes(program) for program in programs]
    kinds: dict[tuple[bool, tuple[tuple[str, ...], ...]], list[Part]] = {}
    for part in plan.program.parts:
        lines = tuple(
            tuple(row.line() for row in rows(program, part, size))
            for program, size in zip(programs, sizes, strict=True)
        )
        kinds.setdefault((part.kind >= 0, lines), []).append(part)
    common = sorted(kinds, key=lambda kind: -len(kinds[kind]))[:MOST]
    drawn = {kind: parts for kind, parts in kinds.items() if kind in common}
    by_part: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        by_part.setdefault(str(entry.get("part")), []).append(entry)
    drawings: dict[str, int] = {}
    found = []
    for (block, lines), parts in drawn.items():
        shown = [_drawing(plan, programs, parts, at) for at in range(len(programs))]
        found.append(
            {
                "title": title_of(parts),
                "block": block,
                "states": [drawings.setdefault(one, len(drawings)) for one in shown],
                "text": list(lines[0]),
                "diffs": [changed(before, after) for before, after in pairwise(lines)],
                "rewrites": [
                    told(
                        entry
                        for entry in by_part.get(parts[0].name, ())
                        if entry.get("pass") == step.what.name
                    )
                    for step in plan.steps
                ],
            }
        )
    return {"parts": found, "drawings": list(drawings), "parts_left_out": len(kinds) - len(drawn)}


def title_of(parts: Sequence[Part]) -> str:
    """``prologue``, ``layer 3``, ``layers 0..2, 4``."""
    if parts[0].kind < 0:
        return parts[0].name
    return f"{'layer' if len(parts) == 1 else 'layers'} {span(number_of(part) for part in parts)}"


def changed(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """A unified diff without the names of files; empty where nothing changes."""
    return list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]


def told(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per rewrite of a part by a pass: where, what it did, what was proved or measured."""
    lines = [_line(entry) for entry in entries]
    rest = len(lines) - MORE_REWRITES
    return lines if rest <= 0 else [*lines[:MORE_REWRITES], f"and {rest} more"]


def _line(entry: Mapping[str, Any]) -> str:
    inside = f"{entry['part']}."
    line = f"{entry['where']}: {', '.join(entry['edits'])}".replace(inside, "")
    if "certificate" in entry:
        line += f" · proved, error {entry['certificate']['math']:.1e}"
    return line + "".join(f" · {name} {value:g}" for name, value in entry.get("measures", {}).items())


def _drawing(plan: Plan, programs: Sequence[Program], parts: Sequence[Part], at: int) -> str:
    """The first of some parts that are alike, in one state: before all passes, or after the first ``at`` of them.

    Marked are the matches of the patterns that the last of these passes rewrote, at the start all that there are.
    """
    steps = plan.steps[:at]
    found = _matches(plan, parts[0]) if parts[0].kind >= 0 else ()
    rewrites = [rewrite for step in steps for rewrite in step.answer.rewrites]
    if steps:
        last = {rewrite.pattern.replace("-", "_") for rewrite in steps[-1].answer.rewrites}
        found = tuple(match for match in found if match.pattern in last)
    diagram = block_diagram(programs[at], parts[0], matches=found, rewrites=own_rewrites(rewrites, parts[0]))
    return svg(diagram, style=False)


def own_rewrites(rewrites: Iterable[Rewrite], part: Part) -> list[Rewrite]:
    """Those that edit a module of a block, and those that reach over all of them."""
    return [
        rewrite
        for rewrite in rewrites
        if rewrite.basis is not None
        or any(name.startswith(f"{part.name}.") for name in (*rewrite.modules, rewrite.where))
    ]


def _matches(plan: Plan, part: Part) -> tuple[Matched, ...]:
    known = plan.program.memory.setdefault("report matches", {})
    if part.index not in known:
        known[part.index] = matched(plan.program, part=part)
    return known[part.index]
