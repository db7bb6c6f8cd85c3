"""Following channels through the graph, by the laws: who reads what a linear wrote, and in which order.

Channels are tracked by running layout ops on integer labels, so that any view, transpose, slice or grouping
of heads is understood without being known.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import Any

import torch
from torch import fx

from .canon import symbolic
from .experts import ROUTED
from .laws import EVERYTHING, LAYOUT, Blocks, Map, is_attention, law, operands, shape, writes
from .program import Program

aten = torch.ops.aten

COPY_OPS = frozenset(EVERYTHING) | frozenset(LAYOUT) | {ROUTED}


@dataclass(frozen=True)
class Reader:
    """A linear that reads the followed value; ``labels[k]`` is the followed channel in its input channel k."""

    node: fx.Node
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Obstacle:
    """Where a map stops, and why."""

    node: fx.Node
    reason: str


@dataclass
class Flow:
    """Everything that a followed value reaches."""

    readers: list[Reader] = field(default_factory=list)
    obstacles: list[Obstacle] = field(default_factory=list)
    crossed: list[fx.Node] = field(default_factory=list)
    """Nodes that the map passed through."""


def channel_labels(node: fx.Node) -> torch.Tensor:
    """Labels 0..C-1 of a value's channels, of the value's shape: its last axis, or the heads of an attention."""
    size = shape(node)
    if not is_attention(node):
        return torch.arange(size[-1]).expand(size)
    if heads_first(node):
        return torch.arange(size[1] * size[3]).view(size[1], 1, size[3]).expand(size)
    return torch.arange(size[2] * size[3]).view(size[2], size[3]).expand(size)


def heads_first(node: fx.Node) -> bool:
    """Whether an attention's output is [b, h, s, d]; that of ``qc::attention`` is [b, s, h, d]."""
    return not str(node.target).startswith("qc.")


def copies(start: fx.Node, channels: torch.Tensor | None = None) -> Iterator[tuple[fx.Node, Any]]:
    """A value and its copies, casts and views, each with the labels of the channels of ``start``.

    ``channels`` are labels of the shape of ``start``; by default those of ``channel_labels``.
    """
    labels: dict[fx.Node, Any] = {start: channel_labels(start) if channels is None else channels}
    queue = [start]
    while queue:
        node = queue.pop(0)
        yield node, labels[node]
        for user in node.users:
            if user not in labels and user.target in COPY_OPS:
                labels[user] = _relabel(user, node, labels)
                queue.append(user)


def follow(
    program: Program, start: fx.Node, what: Map, *, copies_only: bool = False, until: fx.Node | None = None,
    also: Callable[[fx.Node], bool] = lambda node: False,
) -> Flow:  # fmt: skip
    """Follow the channels of ``start`` forward to the linears that read them.

    ``copies_only`` stops at everything that is not a cast, copy or layout op; ``until`` stops at one node,
    which is not counted as an obstacle; ``also`` lets more ops through, of one value, channel by channel.
    """
    flow = Flow()
    labels: dict[fx.Node, Any] = {start: channel_labels(start)}
    queue = list(start.users)
    heapify(queue)  # in graph order: all operands of a node are labelled before it is looked at
    seen: set[fx.Node] = {start}
    while queue:
        user = heappop(queue)
        if user in seen or user is until or symbolic(user):
            continue
        seen.add(user)
        carried = [operand for operand in user.all_input_nodes if operand in labels]
        leaf = program.leaf(user)
        if leaf is not None and leaf.kind == "linear":
            _read(flow, user, labels[carried[0]])
            continue
        reason = None if also(user) else _stop(program, user, carried, labels, what, copies_only)
        if reason is not None:
            flow.obstacles.append(Obstacle(user, reason))
            continue
        labels[user] = _relabel(user, carried[0], labels)
        flow.crossed.append(user)
        for later in user.users:
            heappush(queue, later)
    return flow


def _stop(
    program: Program,
    user: fx.Node,
    carried: list[fx.Node],
    labels: dict[fx.Node, Any],
    what: Map,
    copies_only: bool,
) -> str | None:
    """Why a map that the operands ``carried`` have does not come out of ``user`` once; None when it does."""
    for node in carried:
        verdict = _verdict(program, user, node, what, copies_only)
        if isinstance(verdict, Blocks):
            return verdict.reason
        missing = [operand for operand in verdict.joins if operand not in carried]
        if missing:
            return f"it is added to {missing[0].name}, which does not carry the map"
        if any(operand is not node and operand not in verdict.joins for operand in carried):
            return "the map enters it twice"
    first, *others = (labels[node] for node in carried)
    if any(not torch.equal(*torch.broadcast_tensors(first, other)) for other in others):
        return "its operands hold the channels in different orders"
    return None


def _verdict(program: Program, user: fx.Node, node: fx.Node, what: Map, copies_only: bool) -> Any:
    if user.op == "output":
        return Blocks("it leaves the graph")
    if copies_only and user.target not in COPY_OPS:
        return Blocks("it is used by more than casts, copies and views")
    return law(program, user, node, what)


def _read(flow: Flow, user: fx.Node, labels: torch.Tensor) -> None:
    rows = constant_rows(labels)
    if rows is None:
        flow.obstacles.append(Obstacle(user, "its input channels mix positions of the sequence"))
    else:
        flow.readers.append(Reader(user, rows))


def _relabel(node: fx.Node, operand: fx.Node, labels: dict[fx.Node, Any]) -> Any:
    if is_attention(node):
        return _through_attention(node, labels[operand])
    if node.target in LAYOUT:

        def concrete(arg: fx.Node) -> Any:
            if arg in labels:
                return labels[arg]
            value = arg.meta.get("val")
            if isinstance(value, torch.SymInt):
                return int(value.node.hint)
            if isinstance(value, torch.Tensor):
                return torch.zeros(shape(arg), dtype=torch.long)
            return value

        args = fx.map_arg(node.args, concrete)
        kwargs = fx.map_arg(node.kwargs, concrete)
        args, kwargs = _plain(args), _plain(kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return torch.broadcast_to(labels[operand], shape(node))


def _plain(value: Any) -> Any:
    """Symbolic sizes inside arguments, replaced by the example's sizes."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint)
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _through_attention(node: fx.Node, values: torch.Tensor) -> torch.Tensor:
    """Labels of [b, kv, t, d] values on the heads of the output: query head h reads value head h // group."""
    size = shape(node)
    heads = size[1] if heads_first(node) else size[2]
    per_head = values[0, :, 0, :].repeat_interleave(heads // values.shape[1], dim=0)  # [h, d]
    out = per_head[:, None, :] if heads_first(node) else per_head[None, :, :]
    return out.expand(size)


@dataclass(frozen=True)
class Stream:
    """Some channels of one writer, as the value ``node``."""

    writer: fx.Node
    node: fx.Node
    rows: tuple[int, ...] | None
    """``rows[c]`` is the writer's channel in channel c; None where heads hold different channels."""


CUTS = frozenset({aten.slice.Tensor, aten.select.int, aten.index.Tensor, operator.getitem})
"""Layout ops that take some channels out of a value."""


def streams(program: Program, writer: fx.Node) -> tuple[Stream, ...]:
    """The value a linear writes, and each piece into which slices cut its channels (packed qkv, gate_up)."""
    known = program.memory.setdefault("streams", {})
    if writer not in known:
        known[writer] = _streams(writer)
    return known[writer]


@lru_cache(maxsize=64)
def in_order(width: int) -> tuple[int, ...]:
    """All channels of a value; one tuple for all values of a width, of which deep models have thousands."""
    return tuple(range(width))


def _streams(writer: fx.Node) -> tuple[Stream, ...]:
    found = [Stream(writer, writer, in_order(shape(writer)[-1]))]
    whole = channel_labels(writer).numel()
    for node, labels in copies(writer):
        if node.target in CUTS and isinstance(labels, torch.Tensor) and 0 < labels.numel() < whole:
            found.append(Stream(writer, node, constant_rows(labels)))
    return tuple(found)


def beside(stream: Stream) -> Obstacle | None:
    """Who reads the channels of a stream past it: the writer whole, or another piece that overlaps."""
    if stream.node is stream.writer:
        return None
    labelled = dict(copies(stream.writer))
    own, mine = {node for node, _ in copies(stream.node)}, labelled[stream.node]
    for node, labels in labelled.items():
        if node in own or not isinstance(labels, torch.Tensor) or not bool(torch.isin(labels, mine).any()):
            continue
        for user in node.users:
            if user.target not in COPY_OPS and not symbolic(user):
                return Obstacle(user, "it reads the same channels in another way")
    return None


def entries(start: fx.Node, user: fx.Node) -> int:
    """How many operands of ``user`` are ``start`` or copies of it."""
    carried = {node for node, _ in copies(start)}
    return sum(operand in carried for operand in user.args if isinstance(operand, fx.Node))


def constant_rows(labels: torch.Tensor) -> tuple[int, ...] | None:
    """The labels along the last axis, when they are the same at every position; None otherwise."""
    if not labels.numel():
        return ()
    first = labels[(0,) * (labels.dim() - 1)]
    return tuple(first.tolist()) if bool((labels == first).all()) else None


@dataclass(frozen=True)
class Space:
    """A set of channels: who writes them, who reads them, and the norms in between."""

    writers: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    norms: tuple[fx.Node, ...]
    values: tuple[fx.Node, ...]
    obstacles: tuple[Obstacle, ...]

    def __str__(self) -> str:
        return f"{len(self.writers)} writers, {len(self.readers)} readers, {len(self.norms)} norms"


def space(program: Program, start: fx.Node, what: Map) -> Space:
    """Close a value under the laws, forward and backward: all values that must carry the same map."""
    values: dict[fx.Node, None] = {start: None}
    writers: dict[fx.Node, None] = {}
    readers: dict[fx.Node, None] = {}
    norms: dict[fx.Node, None] = {}
    obstacles: dict[fx.Node, Obstacle] = {}
    queue = [start]

    def join(node: fx.Node) -> None:
        if node not in values:
            values[node] = None
            queue.append(node)

    while queue:
        node = queue.pop(0)
        leaf = program.leaf(node)
        if leaf is not None and writes(leaf):
            writers[node] = None
        if leaf is None or leaf.kind not in ("linear", "embedding"):
            for operand in _carriers(program, node, what, obstacles):
                join(operand)
        if leaf is not None and leaf.kind == "norm":
            norms[node] = None
        for user in node.users:
            user_leaf = program.leaf(user)
            if symbolic(user):
                continue  # its size is read, nothing else
            if user_leaf is not None and user_leaf.kind == "linear":
                readers[user] = None
                continue
            verdict = _verdict(program, user, node, what, False)
            if isinstance(verdict, Blocks):
                obstacles.setdefault(user, Obstacle(user, verdict.reason))
            else:
                join(user)
                for other in verdict.joins:
                    join(other)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    ranked = lambda nodes: tuple(sorted(nodes, key=order.__getitem__))  # noqa: E731
    return Space(
        ranked(writers), ranked(readers), ranked(norms), ranked(values),
        tuple(obstacles[node] for node in ranked(obstacles)),
    )  # fmt: skip


def _carriers(
    program: Program, node: fx.Node, what: Map, obstacles: dict[fx.Node, Obstacle]
) -> list[fx.Node]:
    """The operands of ``node`` through which its output carries the map."""
    if node.op != "call_function" and program.leaf(node) is None:
        obstacles.setdefault(node, Obstacle(node, "it is an input of the graph, which nothing can rewrite"))
        return []
    verdicts = {operand: law(program, node, operand, what) for operand in operands(node)}
    through = [operand for operand, verdict in verdicts.items() if not isinstance(verdict, Blocks)]
    if not through:
        reason = next(
            (v.reason for v in verdicts.values() if isinstance(v, Blocks)), "it is made from constants"
        )
        obstacles.setdefault(node, Obstacle(node, reason))
    return through


def feeding(program: Program, node: fx.Node) -> tuple[fx.Node, ...]:
    """The linears from which a value is computed without another linear in between, within its part."""
    seen: dict[fx.Node, None] = {}
    queue, found = [node], []
    while queue:
        current = queue.pop(0)
        if current in seen or current.meta.get("part") != node.meta.get("part"):
            continue
        seen[current] = None
        leaf = program.leaf(current)
        if leaf is not None and leaf.kind == "linear":
            found.append(current)
        else:
            queue.extend(operand for operand in current.all_input_nodes if not symbolic(operand))
    return tuple(found)


def ordered(found: Any) -> tuple[int, ...] | None:
    """The writer's channels behind something bound, where they have one order for all heads; else None."""
    return found.rows if isinstance(found, Stream) else ()
