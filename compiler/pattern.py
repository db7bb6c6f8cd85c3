"""The pattern language: a function over symbols names a shape of dataflow and returns a typed match."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import fx

from .flow import Space, Stream
from .laws import shape
from .program import Program
from .sketch import Binding, Heads, ReadBy, Sketch, Symbol

M = TypeVar("M")


@dataclass(frozen=True)
class Site:
    """Channels of one module: output channels of a writer, input channels of a reader.

    ``channels`` None means all of them, in their order. Otherwise entry i is the module's channel that
    plays the role of channel i of the match.
    """

    module: str
    channels: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.module if self.channels is None else f"{self.module}[{len(self.channels)} channels]"


@dataclass(frozen=True)
class NoMatch:
    """No match here: falsy, with the reason and the place of the attempt that got furthest."""

    reason: str
    at: str
    depth: int = 0
    node: fx.Node | None = field(default=None, compare=False, repr=False)
    """The value at which it failed."""

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Pattern(Generic[M]):
    """A named shape of dataflow. Calling ``find`` gives all matches; ``nearest`` says why there is none."""

    name: str
    function: Callable[[Sketch], M]
    doc: str

    def find(self, program: Program) -> tuple[M, ...]:
        """All matches, in graph order."""
        return tuple(match for match, _ in self._solve(program) if match is not None)

    def nearest(self, program: Program, at: str | None = None) -> NoMatch | None:
        """The attempt that got furthest and failed, below the module ``at``; None if nothing was tried."""
        misses = [miss for _, miss in self._solve(program) if miss is not None]
        if at is not None:
            misses = [miss for miss in misses if miss.at == at or miss.at.startswith(at + ".")]
        return max(misses, key=lambda miss: miss.depth, default=None)

    def _solve(self, program: Program) -> Iterator[tuple[M | None, NoMatch | None]]:
        sketch = Sketch()
        drawn = self.function(sketch)

        def descend(depth: int, bound: Binding) -> Iterator[tuple[M | None, NoMatch | None]]:
            if depth == len(sketch.clauses):
                yield fill(drawn, program, bound), None
                return
            for extended, obstacle in sketch.clauses[depth](program, bound):
                if obstacle is None:
                    yield from descend(depth + 1, extended)
                else:
                    yield None, NoMatch(obstacle.reason, place(program, obstacle.node), depth, obstacle.node)

        seen: set[Any] = set()
        for match, miss in descend(0, {}):
            if match is None or match not in seen:
                seen.add(match)
                yield match, miss


def place(program: Program, node: fx.Node) -> str:
    """The qualified module that a node belongs to, or its name."""
    if node.op == "call_module":
        return str(node.target)
    return str(node.meta.get("module", "")).partition("@")[0] or node.name


def fill(drawn: M, program: Program, bound: Binding) -> M:
    """Replace the symbols in a match by what they are bound to."""

    def value(field: Any) -> Any:
        if not isinstance(field, Symbol):
            return field
        found = bound[field.index]
        return typed(found) if field.part is None else getattr(found, field.part)

    fields = {f.name: value(getattr(drawn, f.name)) for f in dataclasses.fields(drawn)}  # type: ignore[arg-type]
    return type(drawn)(**fields)


def typed(found: Any) -> Any:
    """A bound thing as a match holds it: sites for linears, norms and embeddings, node names for values."""
    if isinstance(found, Stream):
        assert found.rows is not None, "a match holds channels in one order"
        return site(found.writer, found.rows)
    if isinstance(found, ReadBy):
        width = len(found.labels)
        return Site(str(found.node.target), None if found.labels == tuple(range(width)) else inverse(found))
    if isinstance(found, Heads):
        return found.node.name
    if isinstance(found, fx.Node):
        return Site(str(found.target)) if found.op == "call_module" else found.name
    if isinstance(found, Space):
        return found
    return tuple(typed(item) for item in found)


def site(writer: fx.Node, rows: tuple[int, ...]) -> Site:
    """The output channels ``rows`` of a writer; all of them in order are written as None."""
    return Site(str(writer.target), None if rows == tuple(range(shape(writer)[-1])) else rows)


def inverse(found: ReadBy) -> tuple[int, ...]:
    """``channels[i]``: the input channel of the reader that holds channel i of what it reads."""
    positions = {label: channel for channel, label in enumerate(found.labels)}
    return tuple(positions[i] for i in sorted(positions))


def pattern(function: Callable[[Sketch], M]) -> Pattern[M]:
    """Make a pattern of a function over symbols."""
    return Pattern(function.__name__, function, function.__doc__ or "")
