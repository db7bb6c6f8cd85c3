"""The difference of two states of a program, part by part, as unified diffs of their rows."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ..program import Part, Program
from .rows import Sizes, rows
from .runs import Run

CONTEXT = 1
"""Unchanged rows around a change."""


@dataclass(frozen=True)
class Change:
    """What changes in parts that change alike."""

    run: Run
    lines: tuple[str, ...]
    """Of the unified diff of the first part, without its two head lines."""

    @property
    def title(self) -> str:
        """The parts, as the text names them."""
        return self.run.title


def part_diff(before: Program, after: Program, part: Part, context: int = CONTEXT) -> tuple[str, ...]:
    """Lines of the unified diff of one part, ``@@`` heads included; nothing where it is the same.

    Values have the names that they have in ``before``; those that are new are ``new0``, ``new1``, ... So a row that
    says the same is the same line, however many were inserted above it.
    """
    old = list(rows(before, part, Sizes(before)))
    known = {row.node.name: row.name for row in old if row.name}
    new = rows(after, part, Sizes(after), known)
    found = difflib.unified_diff(
        [row.line() for row in old], [row.line() for row in new], n=context, lineterm=""
    )
    return tuple(found)[2:]


def changes(before: Program, after: Program) -> tuple[Change, ...]:
    """The parts that differ, in order, consecutive blocks that change alike together."""
    found: list[tuple[list[Part], tuple[str, ...]]] = []
    for part in before.parts:
        lines = part_diff(before, after, part)
        near = found and found[-1][0][-1].index == part.index - 1
        if near and part.kind >= 0 and found[-1][0][0].kind >= 0 and found[-1][1] == lines:
            found[-1][0].append(part)
        elif lines:
            found.append(([part], lines))
    return tuple(Change(Run(tuple(parts)), lines) for parts, lines in found)
