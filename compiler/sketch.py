"""Sketch: the symbols of a pattern and the clauses that bind them to a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from .activations import degree, power_of
from .flow import (
    Flow,
    Obstacle,
    Stream,
    beside,
    channel_labels,
    constant_rows,
    copies,
    entries,
    feeding,
    follow,
    heads_first,
    ordered,
    space,
    streams,
)
from .laws import Map, is_attention, op_name, operands, shape
from .program import Program

SCALE, ROTATION, CENTRED, HEAD = Map.SCALE, Map.ROTATION, Map.CENTRED, Map.HEAD


@dataclass(frozen=True)
class Symbol:
    """A name in a pattern; it is bound to something of the graph when the pattern matches."""

    index: int
    part: str | None = None

    def __getattr__(self, part: str) -> Symbol:
        if part.startswith("__"):
            raise AttributeError(part)
        return Symbol(self.index, part)


Binding = dict[int, Any]
Clause = Callable[[Program, Binding], Iterator[tuple[Binding, Obstacle | None]]]
"""Yields extended bindings; a pair with an Obstacle is a failed attempt with its reason."""


@dataclass(frozen=True)
class Heads:
    """An attention as the reader of its values; ``rows[j * head_dim + c]`` is the writer's channel in value head j."""

    node: fx.Node
    rows: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ReadBy:
    """A linear found as a reader, with the flow that led to it."""

    node: fx.Node
    labels: tuple[int, ...]
    flow: Flow
    degree: int = 1
    """The power to which a scale of what it reads arrives."""


def value_of(found: Any) -> fx.Node:
    """The value node that something bound stands for."""
    return found.node if isinstance(found, (Stream, ReadBy, Heads)) else found


class Sketch:
    """What a pattern function draws on. Every method adds one clause."""

    def __init__(self) -> None:
        self.clauses: list[Clause] = []
        self._count = 0

    def _symbol(self) -> Symbol:
        self._count += 1
        return Symbol(self._count - 1)

    def linear(self, reads: Symbol | None = None, through: Map | None = None) -> Symbol:
        """A linear; with ``reads``, one that reads this value across what lets ``through`` pass."""
        symbol = self._symbol()

        def any_linear(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            for node in program.graph.nodes:
                leaf = program.leaf(node)
                if leaf is not None and leaf.kind == "linear":
                    for stream in streams(program, node):
                        yield {**bound, symbol.index: stream}, None

        def reader(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            assert reads is not None
            start = value_of(bound[reads.index])
            if ordered(bound[reads.index]) is None:
                yield bound, Obstacle(start, "its channels differ from head to head")
                return
            flow = follow(program, start, through or SCALE, copies_only=through is None)
            whole = list(range(int(channel_labels(start).max()) + 1))
            for found in flow.readers:
                read = ReadBy(found.node, found.labels, flow)
                partial = Obstacle(found.node, "it does not read every channel exactly once")
                yield {**bound, symbol.index: read}, None if sorted(found.labels) == whole else partial
            if not flow.readers:
                yield bound, (flow.obstacles or [Obstacle(start, "no linear reads it")])[0]

        self.clauses.append(any_linear if reads is None else reader)
        return symbol

    def activated(self, reads: Symbol) -> Symbol:
        """A linear that reads a value through ReLU or whole powers; ``degree`` is the power of a scale there."""
        symbol = self._symbol()

        def clause(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            start = value_of(bound[reads.index])
            if ordered(bound[reads.index]) is None:
                yield bound, Obstacle(start, "its channels differ from head to head")
                return
            flow = follow(program, start, SCALE, copies_only=True, also=lambda node: degree(node) is not None)
            power = power_of(flow.crossed)
            whole = list(range(shape(start)[-1]))
            for found in flow.readers:
                read = ReadBy(found.node, found.labels, flow, power or 1)
                obstacle = None
                if power is None:
                    obstacle = Obstacle(found.node, "no ReLU stands in between")
                elif sorted(found.labels) != whole:
                    obstacle = Obstacle(found.node, "it does not read every channel exactly once")
                yield {**bound, symbol.index: read}, obstacle
            if not flow.readers:
                yield bound, (flow.obstacles or [Obstacle(start, "no linear reads it")])[0]

        self.clauses.append(clause)
        return symbol

    def whole_linear(self) -> Symbol:
        """A linear with all its channels, whatever reads it."""
        symbol = self._symbol()

        def clause(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            for node in program.graph.nodes:
                leaf = program.leaf(node)
                if leaf is not None and leaf.kind == "linear":
                    yield {**bound, symbol.index: node}, None

        self.clauses.append(clause)
        return symbol

    def channels(self, writer: Symbol, attention: Symbol) -> Symbol:
        """The channels of ``writer`` in the order in which the value heads of ``attention`` hold them."""
        symbol = self._symbol()

        def clause(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            stream, heads = bound[writer.index], bound[attention.index]
            yield {**bound, symbol.index: Stream(stream.writer, stream.node, heads.rows)}, None

        self.clauses.append(clause)
        return symbol

    def value(self) -> Symbol:
        """Any value; a later clause binds it."""
        return self._symbol()

    def mul(self, factor: Symbol, other: Symbol) -> Symbol:
        """A product that ``factor`` enters by copies and views; ``other`` is bound to the other factor."""
        product = self._symbol()

        def clause(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            start = value_of(bound[factor.index])
            if ordered(bound[factor.index]) is None:
                yield bound, Obstacle(start, "its channels differ from head to head")
                return
            for node, labels in copies(start):
                for user in node.users:
                    factors = operands(user)
                    if op_name(user) != "aten.mul" or len(factors) != 2:
                        continue
                    rest = factors[0] if factors[1] is node else factors[1]
                    if constant_rows(labels) == tuple(range(shape(start)[-1])) and shape(user) == shape(node):
                        yield {**bound, product.index: user, other.index: rest}, None
                    else:
                        yield bound, Obstacle(user, "the channels enter the product in another order")
            yield bound, Obstacle(start, "no product of two values reads it")

        self.clauses.append(clause)
        return product

    def norm(self) -> Symbol:
        """A norm with a gain."""
        symbol = self._symbol()

        def clause(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            for node in program.graph.nodes:
                leaf = program.leaf(node)
                if leaf is not None and leaf.norm is not None and leaf.norm.weight:
                    yield {**bound, symbol.index: node}, None

        self.clauses.append(clause)
        return symbol

    def attention(self, *, v: Symbol) -> Symbol:
        """An attention whose values are ``v``, by copies and views."""
        symbol = self._symbol()

        def clause(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            stream = bound[v.index]
            below = {node for node, _ in copies(stream.node)}
            for node, labels in copies(stream.writer):
                for user in node.users if node in below else ():
                    if not is_attention(user) or user.args[2] is not node:
                        continue
                    _, kv_heads, _, head_dim = shape(node)
                    size = shape(user)
                    heads = size[1] if heads_first(user) else size[2]
                    rows = constant_rows(labels.transpose(1, 2).flatten(2))
                    if rows is None:
                        yield bound, Obstacle(user, "its value heads mix positions of the sequence")
                    else:
                        yield {**bound, symbol.index: Heads(user, rows, heads, kv_heads, head_dim)}, None
            yield bound, Obstacle(stream.node, "no attention takes it as its values")

        self.clauses.append(clause)
        return symbol

    def only_reader(self, written: Symbol, reader: Symbol) -> None:
        """Nothing but ``reader`` reads ``written``, across casts, copies and views or what led to it."""

        def clause(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            found = bound[reader.index]
            if isinstance(found, ReadBy):
                others = [r.node for r in found.flow.readers if r.node is not found.node]
                obstacles = found.flow.obstacles + [Obstacle(n, "another linear reads it") for n in others]
            else:
                start = value_of(bound[written.index])
                flow = follow(program, start, SCALE, copies_only=True, until=value_of(found))
                obstacles = flow.obstacles + [Obstacle(r.node, "a linear reads it too") for r in flow.readers]
                if entries(start, value_of(found)) > 1:
                    obstacles = [*obstacles, Obstacle(value_of(found), "it enters twice")]
            past = beside(bound[written.index]) if isinstance(bound[written.index], Stream) else None
            obstacles = [*obstacles, past] if past is not None else obstacles
            yield bound, obstacles[0] if obstacles else None

        self.clauses.append(clause)

    def readers(self, written: Symbol) -> Symbol:
        """All linears that read a value, by casts, copies and views; and nothing else reads it."""
        symbol = self._symbol()

        def clause(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            start = value_of(bound[written.index])
            flow = follow(program, start, SCALE, copies_only=True)
            whole = tuple(range(shape(start)[-1]))
            moved = [
                Obstacle(r.node, "it reads the channels in another order")
                for r in flow.readers
                if r.labels != whole
            ]
            moved += [
                Obstacle(r.node, "it reads it from another part of the model, which is solved by itself")
                for r in flow.readers
                if r.node.meta.get("part") != start.meta.get("part")
            ]
            obstacles = flow.obstacles + moved
            if not flow.readers:
                obstacles.append(Obstacle(start, "no linear reads it"))
            readers = tuple(reader.node for reader in flow.readers)
            yield {**bound, symbol.index: readers}, obstacles[0] if obstacles else None

        self.clauses.append(clause)
        return symbol

    def feeding(self, read: Symbol) -> Symbol:
        """The linears of the same part from which a value is computed, nearest first."""
        symbol = self._symbol()

        def clause(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            yield {**bound, symbol.index: feeding(program, value_of(bound[read.index]))}, None

        self.clauses.append(clause)
        return symbol

    def embedding(self) -> Symbol:
        """A table look-up that writes channels."""
        symbol = self._symbol()

        def clause(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            for node in program.graph.nodes:
                leaf = program.leaf(node)
                if leaf is not None and leaf.kind == "embedding":
                    yield {**bound, symbol.index: node}, None

        self.clauses.append(clause)
        return symbol

    def space(self, start: Symbol, what: Map) -> Symbol:
        """The closed set of values that must carry ``what`` when ``start`` does."""
        symbol = self._symbol()

        def clause(program: Program, bound: Binding) -> Iterator[tuple[Binding, Obstacle | None]]:
            found = space(program, value_of(bound[start.index]), what)
            yield {**bound, symbol.index: found}, found.obstacles[0] if found.obstacles else None

        self.clauses.append(clause)
        return symbol
