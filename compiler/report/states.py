"""The states of a program along its plan: a drawing, the rows and their changes, for every kind of part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..contract import Rewrite
from ..plan import Plan
from ..program import Part, Program
from ..show.block import block_diagram
from ..show.diff import part_diff
from ..show.matched import MARKED, Matched, matched
from ..show.rewrites import Told
from ..show.rows import Sizes, rows
from ..show.runs import Run, condensed, number_of, span
from ..show.svg import svg
from .kinds import kinds_of, runs_of

MOST = 24
"""Kinds of parts that are drawn. A model with more of them has its rarest ones left out, and the page says so."""
MOST_REWRITES = 40
"""Rewrites of a part that are listed; a layer of experts has hundreds."""


def states_of(plan: Plan, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``parts``, each with its states, and ``drawings``, which the states name by number.

    Parts that are the same in every state are one. A part has ``title``, whether it is a ``block``, per state the
    number of its drawing, its ``text`` before all passes, and per pass its ``diffs`` and its ``rewrites``.
    """
    programs = [step.program for step in plan.steps] + [plan.final]
    kinds = kinds_of(programs)
    runs = runs_of(kinds)
    small = [condensed(program, runs) for program in programs]
    drawn = sorted(sorted(kinds, key=len, reverse=True)[:MOST], key=lambda parts: parts[0].index)
    firsts = [parts[0] for parts in drawn if parts[0].kind >= 0]
    marked = [_marked(plan, small, at, firsts) for at in range(len(small))]
    told = [Told(plan.program, step.answer.rewrites, entries) for step in plan.steps]
    drawings: dict[str, int] = {}
    found = []
    for parts in drawn:
        first = parts[0]
        shown = [_drawing(plan, program, first, at, marked[at]) for at, program in enumerate(small)]
        found.append(
            {
                "title": title_of(parts),
                "block": first.kind >= 0,
                "states": [drawings.setdefault(one, len(drawings)) for one in shown],
                "text": [row.line() for row in rows(small[0], first, Sizes(small[0]))],
                "diffs": [list(part_diff(before, after, first)) for before, after in pairwise(small)],
                "rewrites": [_lines(one, Run(tuple(parts))) for one in told],
            }
        )
    return {"parts": found, "drawings": list(drawings), "parts_left_out": len(kinds) - len(drawn)}


def title_of(parts: Sequence[Part]) -> str:
    """``prologue``, ``layer 3``, ``layers 0..2, 4``."""
    if parts[0].kind < 0:
        return parts[0].name
    return f"{'layer' if len(parts) == 1 else 'layers'} {span(number_of(part) for part in parts)}"


def _lines(told: Told, run: Run) -> list[str]:
    """One line per rewrite of a run by a pass: where, its claim, what was proved, what it did."""
    lines = [*told.across(), *told.lines(run)]
    rest = len(lines) - MOST_REWRITES
    return lines if rest <= 0 else [*lines[:MOST_REWRITES], f"and {rest} more"]


def _drawing(plan: Plan, program: Program, part: Part, at: int, matches: Sequence[Matched]) -> str:
    rewrites = [rewrite for step in plan.steps[:at] for rewrite in step.answer.rewrites]
    diagram = block_diagram(program, part, matches=matches, rewrites=own_rewrites(rewrites, part))
    return svg(diagram, style=False)


def _marked(plan: Plan, small: Sequence[Program], at: int, firsts: Sequence[Part]) -> tuple[Matched, ...]:
    """What is marked after so many passes: matches of the patterns that the last one rewrote, at the start of all.

    They are those of the program before all passes; the residual stream is one space only once norm gains are fused.
    """
    if not at:
        return matched(small[0], [name for name in MARKED if name != "residual"], firsts)
    last = {rewrite.pattern for rewrite in plan.steps[at - 1].answer.rewrites}
    names = [name for name in MARKED if name in last and name != "residual"]
    found = matched(small[0], names, firsts) if names else ()
    return found + (matched(small[at - 1], ["residual"], firsts) if "residual" in last else ())


def own_rewrites(rewrites: Iterable[Rewrite], part: Part) -> list[Rewrite]:
    """Those that edit a module of a block, and those that reach over all of them."""
    return [
        rewrite
        for rewrite in rewrites
        if rewrite.basis is not None
        or any(name.startswith(f"{part.name}.") for name in (*rewrite.modules, rewrite.where))
    ]
