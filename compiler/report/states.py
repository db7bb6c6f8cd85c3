"""The states of a program along its plan: a drawing, the rows and their changes, for every kind of part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..contract import Rewrite
from ..plan import Plan, Step
from ..program import Part, Program
from ..show.block import block_diagram
from ..show.diff import part_diff
from ..show.matched import Matched, matched
from ..show.rewrites import Told
from ..show.rows import Sizes, rows
from ..show.runs import Run, number_of, span
from ..show.svg import svg

MOST = 24
"""Kinds of parts that are drawn. A model with more of them has its rarest ones left out, and the page says so."""
MORE_REWRITES = 40
"""Rewrites of a part that are listed; a layer of experts has hundreds."""


def states_of(plan: Plan, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
                "diffs": [list(part_diff(before, after, parts[0])) for before, after in pairwise(programs)],
                "rewrites": [told(plan, step, Run(tuple(parts)), entries) for step in plan.steps],
            }
        )
    return {"parts": found, "drawings": list(drawings), "parts_left_out": len(kinds) - len(drawn)}


def title_of(parts: Sequence[Part]) -> str:
    """``prologue``, ``layer 3``, ``layers 0..2, 4``."""
    if parts[0].kind < 0:
        return parts[0].name
    return f"{'layer' if len(parts) == 1 else 'layers'} {span(number_of(part) for part in parts)}"


def told(plan: Plan, step: Step, run: Run, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per rewrite of a run by a pass: where, its claim, what was proved, what it did."""
    found = Told(plan.program, step.answer.rewrites, entries)
    lines = [*found.across(), *found.lines(run)]
    rest = len(lines) - MORE_REWRITES
    return lines if rest <= 0 else [*lines[:MORE_REWRITES], f"and {rest} more"]


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
