"""Runs: consecutive blocks that have the same rows, which every rendering shows once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import fx

from ..program import Part, Program
from .rows import Sizes, names_of, outside, rows


@dataclass(frozen=True)
class Run:
    """Blocks one after the other that are alike, or the prologue or the epilogue alone."""

    parts: tuple[Part, ...]

    @property
    def first(self) -> Part:
        """The part whose rows stand for all."""
        return self.parts[0]

    def split(self, at: Iterable[Part]) -> tuple[Run, ...]:
        """The same blocks as runs of which one begins with each of these parts."""
        starts = {0, *(self.parts.index(part) for part in at if part in self.parts)}
        edges = [*sorted(starts), len(self.parts)]
        return tuple(Run(self.parts[a:b]) for a, b in itertools.pairwise(edges))

    @property
    def title(self) -> str:
        """``model.layers.0..31 alike``, or the name of the part."""
        first, last = self.first, self.parts[-1]
        if len(self.parts) == 1:
            return first.name
        number = str(number_of(first))
        if not first.name.endswith(number):
            return f"{first.name} to {last.name} alike"
        return f"{first.name.removesuffix(number)}{number}..{number_of(last)} alike"


def runs(program: Program) -> tuple[Run, ...]:
    """The parts in order, consecutive blocks with equal rows together."""
    sizes = Sizes(program)
    found: list[list[Part]] = []
    before: list[str] = []
    for part in program.parts:
        own = [row.line() for row in rows(program, part, sizes)]
        if found and part.kind >= 0 and found[-1][0].kind >= 0 and own == before:
            found[-1].append(part)
        else:
            found.append([part])
        before = own
    return tuple(Run(tuple(group)) for group in found)


def number_of(part: Part) -> int:
    """The index of a block in its stack."""
    return part.index - 1


def span(numbers: Iterable[int]) -> str:
    """Numbers as ranges: ``0, 2..4``."""
    found: list[list[int]] = []
    for n in numbers:
        if found and found[-1][-1] == n - 1:
            found[-1].append(n)
        else:
            found.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in found)


@dataclass(frozen=True)
class Binding:
    """Which values feed one input of the blocks of a run."""

    name: str
    """``in0``"""
    type: str
    sources: tuple[str, ...]
    """``prologue.v9``, ``before.v36 in 1..2``"""

    def __str__(self) -> str:
        return f"{self.name}: {self.type} = {'; '.join(self.sources)}"


def bindings(program: Program, run: Run, sizes: Sizes) -> tuple[Binding, ...]:
    """Which value feeds which input of the parts of a run; nothing for the prologue."""
    if run.first.index == 0:
        return ()
    parts = {part.index: part for part in program.parts}
    named: dict[int, dict[fx.Node, str]] = {}
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for part in run.parts:
        for i, source in enumerate(outside(program, part)):
            origin = source.meta["part"]
            if origin not in named:
                named[origin] = names_of(program, parts[origin], sizes)
            near = origin == part.index - 1 and origin > 0
            where = "before" if near else parts[origin].name
            label = (f"in{i}", sizes.type(source.meta["val"]))
            found.setdefault(label, {}).setdefault(f"{where}.{named[origin][source]}", []).append(
                number_of(part)
            )
    return tuple(
        Binding(
            name, type_, tuple(o if len(origins) == 1 else f"{o} in {span(n)}" for o, n in origins.items())
        )
        for (name, type_), origins in found.items()
    )


def condensed(program: Program, kept: Iterable[Run]) -> Program:
    """A fork with the first block of each run alone: what the others hand on, the first one hands on in their place.

    The blocks that stay are as they were, so that whoever looks for something block by block looks once per run.
    """
    fork = program.fork()
    members = {part.index: list(fork.nodes(part)) for part in fork.parts}
    gone: list[int] = []
    for run in kept:
        for part in run.parts[1:]:
            if len(members[part.index]) != len(members[run.first.index]):
                continue
            gone.append(part.index)
            for own, stays in zip(members[part.index], members[run.first.index], strict=True):
                outer = [user for user in own.users if user.meta["part"] != part.index]
                for user in outer:
                    user.replace_input_with(own, stays)
    for index in reversed(gone):
        for node in reversed(members[index]):
            fork.graph.erase_node(node)
    return replace(fork, parts=tuple(part for part in fork.parts if part.index not in gone))


def boundary(program: Program, part: Part) -> Iterator[fx.Node]:
    """Values of a part that other parts read, in graph order."""
    for node in program.nodes(part):
        if any(user.meta["part"] != part.index for user in node.users):
            yield node
