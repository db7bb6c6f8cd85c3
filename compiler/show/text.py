"""The canonical text of a program: equal programs print alike, and layers that are alike print once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ..contract import Rewrite
from ..program import Part, Program
from .rewrites import Told
from .rows import Sizes, rows
from .runs import Run, bindings, runs


def text(
    program: Program,
    *,
    layer: int | None = None,
    part: Part | None = None,
    rewrites: Sequence[Rewrite] = (),
    journal: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The program as text: prologue, blocks, epilogue, ties and notes. No ids, no times, no paths.

    Consecutive blocks whose lines are the same are printed once, with a table that says which value feeds
    which input in which layer. ``layer`` prints that block alone, ``part`` any part alone. Of ``rewrites``, what passes
    did so far, each has a line, with its certificate where ``journal`` (entries of a finished compile) has one.

    Raises:
        IndexError: There is no block ``layer``.
    """
    sizes, told = Sizes(program), Told(program, rewrites, journal)
    blocks = program.blocks
    if layer is not None:
        if not 0 <= layer < len(blocks):
            raise IndexError(f"layer {layer} of a model with layers 0..{len(blocks) - 1}")
        part = blocks[layer]
    if part is not None:
        return "\n".join([part.name, *_part(program, Run((part,)), sizes, told)]) + "\n"
    out: list[str] = []
    for run in runs(program):
        out += ["", run.title] if out else [run.title]
        out += _part(program, run, sizes, told)
    out += ["", "across blocks", *(f"  {line}" for line in told.across())] if told.across() else []
    out += [f"tied: {name} is {owner}" for name, owner in sorted(program.ties.items())]
    out += [f"note: {note}" for note in program.notes]
    return "\n".join(out) + "\n"


def around(program: Program, node: fx.Node, count: int = 10) -> str:
    """The ``count`` lines of a part around one value, which is marked with ``>``."""
    part = next(part for part in program.parts if part.index == node.meta["part"])
    order = {other: i for i, other in enumerate(program.nodes(part))}
    found = list(rows(program, part, Sizes(program)))
    at = max((i for i, row in enumerate(found) if order[row.node] <= order[node]), default=0)
    start = max(0, min(at - count // 2, len(found) - count))
    return "\n".join(
        f"{'>' if start + i == at else ' '} {row.line()}"
        for i, row in enumerate(found[start : start + count])
    )


def _part(program: Program, run: Run, sizes: Sizes, told: Told) -> list[str]:
    fed = [f"  {binding}" for binding in bindings(program, run, sizes)]
    found = [f"    {line}" for line in told.lines(run)]
    return [
        *fed,
        *(f"  {row.line()}" for row in rows(program, run.first, sizes)),
        *(["  rewrites", *found] if found else []),
    ]
