"""Walk: a block run from linear to linear, each microbatch going on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .contract import Basis
from .device import CPU, moved
from .execute import Route, execute
from .program import Part, Program
from .streams import Stream, Values
from .view import LinearHook

Run = Callable[[Sequence[fx.Node], Mapping[fx.Node, Any], LinearHook, int], dict[fx.Node, Any]]
"""``run(nodes, env, hook, index)``: the values that nodes after these read, for microbatch ``index``."""


@dataclass
class _Place:
    """How far a microbatch has come, and the values that are still read from there on."""

    position: int
    live: dict[fx.Node, Any]


class Walk:
    """What linears of a block read while those before them become others, and what it hands on; nothing is run twice.

    A linear that has been passed keeps what it made then, so linears are asked for in the order of the graph; one that
    lies before is reached from the entrance again.

    Args:
        nodes: The nodes of the block, in graph order.
        enter: The values that enter the block, for a microbatch.
        run: Runs some of the nodes.
        leave: Makes of a value that leaves the block what is handed on.
    """

    def __init__(
        self, nodes: Iterable[fx.Node], enter: Callable[[int], dict[fx.Node, Any]], run: Run,
        leave: Callable[[fx.Node, Any], Any] = lambda node, value: value,
    ) -> None:  # fmt: skip
        self.nodes, self.enter, self.run, self.leave = list(nodes), enter, run, leave
        order = {node: position for position, node in enumerate(self.nodes)}
        self.linears = {str(n.target): p for n, p in order.items() if n.op == "call_module"}
        self.last: dict[fx.Node, int] = {}
        for position, node in enumerate(self.nodes):
            self.last |= dict.fromkeys(node.all_input_nodes, position)
        inside = set(self.nodes)
        self.outputs = [node for node in self.nodes if any(user not in inside for user in node.users)]
        self.last |= dict.fromkeys(self.outputs, len(self.nodes))
        self.places: dict[int, _Place] = {}
        self.results: dict[int, Values] = {}
        """What the block hands on of the microbatches that were run to the end."""

    @torch.no_grad()
    def input(self, name: str, index: int, hook: LinearHook, *, last: bool = False) -> Tensor:
        """What the linear ``name`` reads of microbatch ``index`` [..., in], the linears before it run by ``hook``.

        ``last``: whether nothing after it is going to be asked for; then nothing is kept.
        """
        target = self.linears[name]
        source = self.nodes[target].args[0]
        assert isinstance(source, fx.Node)
        place = self.places.get(index)
        if place is None or place.position > target:
            place = _Place(0, self.enter(index))
        live = place.live
        if place.position < target:
            live = {**live, **self.run(self.nodes[place.position : target], live, hook, index)}
            live = {node: value for node, value in live.items() if self.last.get(node, -1) >= target}
        self.places.pop(index, None)
        if not last:
            self.places[index] = _Place(target, live)
        return live[source]

    @torch.no_grad()
    def finish(self, index: int, hook: LinearHook) -> None:
        """Go on to the end of the block with microbatch ``index``, all linears in their final state."""
        place = self.places.pop(index, None) or _Place(0, self.enter(index))
        values = {**place.live, **self.run(self.nodes[place.position :], place.live, hook, index)}
        self.results[index] = {node.name: self.leave(node, values[node]) for node in self.outputs}


def walk_over(
    stream: Stream, program: Program, part: Part, tensors: Mapping[str, Tensor], bases: Sequence[Basis],
    routed: Callable[[int], Route],
) -> Walk:  # fmt: skip
    """A walk over a block on the boundary values of a stream; ``routed`` says where a microbatch's rows go."""
    return Walk(
        program.nodes(part),
        lambda index: stream.enter(index, program, part, bases),
        lambda nodes, env, hook, index: execute(
            program, nodes, tensors, env, dtype=stream.dtype, linear=hook, route=routed(index)
        ),
        lambda node, value: moved(stream.settle(node.name, value, bases), CPU),
    )
