"""What scales of keys and queries pass: from the leaf that writes them to the attention, found by differentiation.

Rope turns pairs of channels into each other, halves apart or side by side, on all of a head or a part of it. The
Jacobian of what stands between says which channels mix: those must share a scale, and any scale that they share passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .canon import symbolic
from .flow import beside, copies, streams
from .interpret import Semantics, call
from .laws import shape
from .pattern import Site
from .program import Program


@dataclass(frozen=True)
class Carrier:
    """The leaf whose channels a scale of keys or queries is multiplied into."""

    site: Site
    """``channels`` in the order (head, channel of the head), or (channel of the head) where all heads share them."""
    shared: bool
    """Whether it has the same channels for every head, as a norm of one head has."""
    mixed: tuple[tuple[int, ...], ...]
    """Groups of channels of a head that must have one scale."""


def carrier(program: Program, attention: fx.Node, operand: int) -> Carrier | str:
    """The leaf behind q (0) or k (1) of an attention, or the reason why no scale passes from it."""
    end = attention.args[operand]
    assert isinstance(end, fx.Node)
    start = _leaf_behind(program, end)
    if start is None:
        return "no linear and no norm writes it"
    held = _held(program, start, end)
    if isinstance(held, str):
        return held
    node, labels = held
    path = _between(node, end)
    for inner in path:
        others = [u for u in inner.users if u not in path and u is not attention and not symbolic(u)]
        if others:
            return f"{others[0].name} reads it too"
    if sum(arg is end for arg in attention.args) > 1:
        return "the attention reads it twice"
    mixed = _mixed(path, node, end)
    if isinstance(mixed, str):
        return mixed
    rows = labels[0, :, 0, :]
    shared = rows.shape[0] > 1 and bool((rows == rows[:1]).all())
    channels = tuple((rows[0] if shared else rows.flatten()).tolist())
    width = int(channels == tuple(range(shape(start)[-1])))
    return Carrier(Site(str(start.target), None if width else channels), shared, mixed)


def _leaf_behind(program: Program, end: fx.Node) -> fx.Node | None:
    """The nearest linear or norm before a value; None where there are several, or none."""
    found: dict[fx.Node, None] = {}
    seen, queue = set[fx.Node](), [end]
    while queue:
        node = queue.pop()
        if node in seen or symbolic(node) or node.meta.get("part") != end.meta.get("part"):
            continue
        seen.add(node)
        leaf = program.leaf(node)
        if leaf is not None and leaf.kind in ("linear", "norm"):
            found[node] = None
        elif leaf is None:
            queue.extend(node.all_input_nodes)
    return next(iter(found)) if len(found) == 1 else None


def _held(program: Program, start: fx.Node, end: fx.Node) -> tuple[fx.Node, Tensor] | str:
    """The first view [b, heads, t, d] of what the leaf writes, with the leaf's channels in it."""
    above, size = _before(end) | {end}, shape(end)
    seen: dict[fx.Node, Tensor] = {}
    for node, labels in copies(start):
        if not isinstance(labels, Tensor):
            continue
        seen[node] = labels
        whole = len(shape(node)) == 4 and (shape(node)[1], shape(node)[3]) == (size[1], size[3])
        if node in above and whole:
            break
    else:
        return "its heads are no view of what is written"
    if not bool((labels == labels[:1, :, :1]).all()):
        return "its channels differ from position to position"
    for stream in streams(program, start):
        if stream.node is not start and node in {n for n, _ in copies(stream.node)}:
            past = beside(stream)
            return past.reason if past is not None else (node, labels)
    others = [u for n in seen if n is not node for u in n.users if u not in above and not symbolic(u)]
    return f"{others[0].name} reads it too" if others else (node, labels)


def _before(end: fx.Node) -> set[fx.Node]:
    seen, queue = set[fx.Node](), [end]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in seen and source.meta.get("part") == end.meta.get("part"):
                seen.add(source)
                queue.append(source)
    return seen


def _between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes from ``start`` to ``end``, both included, in graph order."""
    above = _before(end) | {end}
    found, queue = {start}, [start]
    while queue:
        for user in queue.pop().users:
            if user in above and user not in found and not symbolic(user):
                found.add(user)
                queue.append(user)
    return sorted(found)


def _mixed(path: list[fx.Node], start: fx.Node, end: fx.Node) -> tuple[tuple[int, ...], ...] | str:
    """Groups of channels of a head that mix between two values [b, heads, t, d]; the reason where it is not linear."""
    _, heads, _, width = shape(start)
    if shape(end)[3] != width:
        return "its heads change their width on the way"
    generator = torch.Generator().manual_seed(0)
    semantics = Semantics(torch.float64, torch.float64)
    env: dict[fx.Node, Any] = {}
    for node in path[1:]:
        for source in node.all_input_nodes:
            if source not in path and source not in env:
                env[source] = _stand_in(source, generator)

    def run(x: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {**env, start: x}
        for node in path[1:]:
            values[node] = call(node, values, semantics)
        return values[end]

    point = torch.randn(shape(start), generator=generator, dtype=torch.float64)
    basis = torch.zeros(heads * width, *point.shape, dtype=torch.float64)
    flat = torch.arange(heads * width)
    basis[flat, 0, flat // width, 0, flat % width] = 1
    try:
        slopes = torch.func.vmap(lambda v: torch.func.jvp(run, (point,), (v,))[1])(basis)
        other = torch.func.jvp(run, (1000 * point,), (basis[0],))[1]
    except Exception as error:
        return f"what stands before the attention cannot be differentiated ({type(error).__name__})"
    if not torch.allclose(other, slopes[0]):
        return "what stands before the attention is not linear in it"
    reach = slopes.abs().amax((1, 3)).view(heads, width, heads, width) > 0  # [from head, from, to head, to]
    across = reach.any(3).any(1)
    if bool((across & ~torch.eye(heads, dtype=torch.bool)).any()):
        return "heads mix before the attention"
    joined = torch.stack([reach[h, :, h] for h in range(heads)]).any(0)
    return _components(joined | joined.T)


def _stand_in(node: fx.Node, generator: torch.Generator) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return int(value.node.hint) if isinstance(value, torch.SymInt) else value
    if value.dtype == torch.bool or not value.is_floating_point():
        return torch.ones(shape(node), dtype=value.dtype)
    return torch.rand(shape(node), generator=generator, dtype=torch.float64) + 0.5


def _components(joined: Tensor) -> tuple[tuple[int, ...], ...]:
    """Connected components of a symmetric relation [n, n]."""
    left, found = list(range(len(joined))), []
    while left:
        group, queue = {left[0]}, [left[0]]
        while queue:
            for other in joined[queue.pop()].nonzero().flatten().tolist():
                if other not in group:
                    group.add(other)
                    queue.append(other)
        found.append(tuple(sorted(group)))
        left = [n for n in left if n not in group]
    return tuple(found)
