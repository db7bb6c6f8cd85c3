"""Matches as a drawing shows them: which modules and values of a program each one names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from .. import registry
from ..flow import Space
from ..pattern import Pattern, Site
from ..program import Part, Program
from .runs import condensed, runs

MARKED = ("norm_linear", "ov", "up_down", "linear_linear", "relu_linear", "residual")
"""Patterns that a drawing looks for where nobody says which."""


@dataclass(frozen=True)
class Matched:
    """One match of a pattern."""

    pattern: str
    """As it is registered: ``norm_linear``."""
    fields: tuple[tuple[str, tuple[str, ...]], ...]
    """Its fields that name something: modules, or values by the name of their node in the graph."""

    flow: tuple[str, ...] = ()
    """Where it names a whole space: the values that lie in it, and whose arrows are its way."""

    @property
    def title(self) -> str:
        """``norm-linear``, as recipes and plans write it."""
        return self.pattern.replace("_", "-")

    @property
    def names(self) -> tuple[str, ...]:
        """Modules and values, each once, in order."""
        return tuple(dict.fromkeys(name for _, names in self.fields for name in names))

    def __str__(self) -> str:
        return ", ".join(f"{field}={'+'.join(names)}" for field, names in self.fields)


def matched(
    program: Program, names: Iterable[str] | None = None, parts: Iterable[Part] = ()
) -> tuple[Matched, ...]:
    """The matches of registered patterns in the first block of every run, in the order of the patterns.

    Blocks that are alike have alike matches: a model of 64 layers is searched as fast as one of two.

    Args:
        program: A program.
        names: Patterns; None is `MARKED`.
        parts: Blocks to be searched although they may not be the first of their runs.

    Raises:
        Refused: No pattern is registered under one of the names.
    """
    patterns: list[Pattern[Any]] = [registry.get("patterns", name) for name in names or MARKED]
    small = condensed(program, [piece for run in runs(program) for piece in run.split(parts)])
    return tuple(
        Matched(pattern.name, tuple(_fields(match)), tuple(_flow(match)))
        for pattern in patterns
        for match in pattern.find(small)
    )


def _fields(match: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    for field in dataclasses.fields(match):
        names = tuple(_names(getattr(match, field.name)))
        if names:
            yield field.name, names


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Site):
        yield value.module
    elif isinstance(value, str):
        yield value
    elif isinstance(value, fx.Node):
        yield value.name if value.op != "call_module" else str(value.target)
    elif isinstance(value, Space):
        for nodes in (value.writers, value.norms, value.readers):
            yield from dict.fromkeys(name for node in nodes for name in _names(node))
    elif isinstance(value, tuple):
        for item in value:
            yield from _names(item)


def _flow(match: Any) -> Iterator[str]:
    for field in dataclasses.fields(match):
        value = getattr(match, field.name)
        if isinstance(value, Space):
            yield from (node.name for node in value.values)
