"""Excerpts: of every match of a pattern the rows that it lies on, and nothing else."""

from __future__ import annotations

from ..program import Part
from .block import block_diagram
from .runs import Run, runs
from .states import State


def excerpts(state: State, pattern: str, part: Part | None = None) -> str:
    """The rows of all matches of a pattern, run by run, or in one part; each match has a head line with its fields."""
    found = [Run((part,))] if part is not None else runs(state.program)
    matches = state.matches([pattern], [run.first for run in found])
    out: list[str] = []
    for run in found:
        diagram = block_diagram(state.program, run.first, matches=matches, rewrites=state.rewrites, run=run)
        rows = {box.id: box.rows for box in diagram.boxes}
        for mark in diagram.marks:
            lit = {*mark.boxes, *(diagram.arrows[i].source for i in mark.arrows)}
            lit |= {diagram.arrows[i].target for i in mark.arrows}
            out += ["", run.title] if out else [run.title]
            out.append(f"  {mark.caption}")
            out += [f"    {row}" for id in rows if id in lit for row in rows[id]]
    return "\n".join([*out, ""]) if out else f"no match of {pattern}: qc why MODEL {pattern} says why\n"
