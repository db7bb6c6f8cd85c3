"""Random small graphs of every op that has a law: whatever the laws let through is numerically true.

A walk goes from a random value through ops that hypothesis chooses. Where the law of each op lets a map through, the
map is put on the value and on what the laws say must carry it too, and has to come out at the end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from qc.compiler.experts import COMBINED, ROUTED
from qc.compiler.laws import LAWS, ROTATIONS, Map, Passes, law
from qc.compiler.program import Program
from tests.programs import BATCH, LENGTH, Drawing, aten, relative, run_float64
from tests.test_laws import CENTRED, EQUAL, ROTATION, SCALE, WIDTH, matrix

EXPERTS = 2


class Walk:
    """A graph in the making: where it has come, and where the channels of its start lie there."""

    def __init__(self, seed: int, choose: Callable[[int], int]) -> None:
        self.drawing = Drawing(seed=seed)
        self.choose = choose
        self.node = self.drawing.value("x", *(BATCH, LENGTH, WIDTH))
        self.labels = torch.arange(WIDTH).expand(BATCH, LENGTH, WIDTH)
        self.carrying: dict[str, Tensor] = {"x": self.labels}
        """Values of the drawing by name that may have to carry the map, with the labels of their channels."""
        self.crossed: list[tuple[fx.Node, fx.Node]] = []
        """Nodes with the operand by which the walk entered them."""

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.labels.shape)

    def axis(self) -> int:
        return self.choose(len(self.size))

    def cross(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.drawing.op(target, *args, **kwargs)
        self.crossed.append((node, self.node))
        self.node = node
        return node

    def move(self, target: Any, *args: Any) -> None:
        """A layout op: channels lie where the op itself takes them."""
        labels = target(self.labels.contiguous(), *args)
        self.cross(target, self.node, *args)
        if not isinstance(labels, Tensor):
            index = self.choose(len(labels))
            labels = labels[index]
            node = self.drawing.op_of_list(self.node, index)
            self.crossed.append((node, self.node))
            self.node = node
        self.labels = labels

    def fresh(self, *size: int, carries: bool = False) -> fx.Node:
        """A random value that the walk has not come from; ``carries`` has the labels of where it is now."""
        name = f"v{len(self.drawing.tensors)}"
        if carries:
            self.carrying[name] = self.labels
        return self.drawing.value(name, *size)

    def whole(self) -> None:
        """Rows of all channels in one piece."""
        self.node = self.drawing.op(aten.clone.default, self.node)
        self.crossed.append((self.node, self.node.all_input_nodes[0]))


def plain(target: Any, *more: Any) -> Callable[[Walk], None]:
    return lambda walk: walk.cross(target, walk.node, *more) and None


def joined(target: Any) -> Callable[[Walk], None]:
    """A sum with a value that carries the map too; in place, it writes over a copy."""

    def step(walk: Walk) -> None:
        if target is aten.add_.Tensor:
            walk.whole()
        other = walk.fresh(*walk.size, carries=True)
        first = target is aten.add_.Tensor or walk.choose(2)
        walk.cross(target, *((walk.node, other) if first else (other, walk.node)))

    return step


def times(target: Any) -> Callable[[Walk], None]:
    """A product with a number per row, or with any value."""

    def step(walk: Walk) -> None:
        if target is aten.mul_.Tensor:
            walk.whole()
        wide = walk.choose(2)
        walk.cross(target, walk.node, walk.fresh(*walk.size[:-1], walk.size[-1] if wide else 1))

    return step


def number(target: Any) -> Callable[[Walk], None]:
    def step(walk: Walk) -> None:
        if target is aten.mul_.Scalar:
            walk.whole()
        walk.cross(target, walk.node, 0.5 + walk.choose(3))

    return step


def sizes(walk: Walk) -> list[int]:
    """Other sizes for as many elements."""
    total = walk.labels.numel()
    return [[total // walk.size[-1], walk.size[-1]], [1, -1, walk.size[-1]], [-1, 2 - total % 2], [total]][
        walk.choose(4)
    ]


def views(target: Any) -> Callable[[Walk], None]:
    def step(walk: Walk) -> None:
        walk.whole()
        walk.cross(aten.contiguous.default, walk.node)
        walk.move(target, sizes(walk))

    return step


def pieces(target: Any) -> Callable[[Walk], None]:
    """An op that cuts an axis into equal pieces."""

    def step(walk: Walk) -> None:
        axis = walk.axis()
        size = walk.size[axis]
        if target is aten.unbind.int:
            walk.move(target, axis)
        elif target is aten.chunk.default:
            walk.move(target, 2, axis)
        elif target is aten.split.Tensor:
            walk.move(target, max(1, size // 2), axis)
        else:
            walk.move(target, [1, size - 1] if size > 1 else [size], axis)

    return step


def index(walk: Walk) -> None:
    axis = walk.axis()
    order = torch.randperm(walk.size[axis], generator=walk.drawing.generator)
    name = f"order{len(walk.drawing.tensors)}"
    picked = walk.drawing.constant(name, order)
    walk.labels = walk.labels.index_select(axis, order)
    walk.cross(aten.index.Tensor, walk.node, [*[None] * axis, picked])


def squeeze(walk: Walk) -> None:
    axis = walk.axis()
    walk.move(aten.unsqueeze.default, axis)
    walk.move(aten.squeeze.dim, axis)


def turned(walk: Walk) -> None:
    if len(walk.size) != 2:
        walk.move(aten.reshape.default, [-1, walk.size[-1]])
    walk.move(aten.t.default)


def mixture(walk: Walk) -> None:
    """Rows sent to experts and summed up again."""
    if len(walk.size) != 2:
        walk.move(aten.reshape.default, [-1, walk.size[-1]])
    d, rows = walk.drawing, walk.size[0]
    chosen = d.constant(f"i{len(d.tensors)}", torch.randint(EXPERTS, (rows, 1), generator=d.generator))
    weight = walk.fresh(rows, 1)
    start = walk.node
    ys = []
    for expert in range(EXPERTS):
        sent = d.op(ROUTED, start, chosen, expert)
        walk.crossed.append((sent, start))
        ys.append(d.op(aten.neg.default, sent))
    walk.node = d.op(COMBINED, chosen, weight, ys)
    walk.crossed.append((walk.node, ys[walk.choose(EXPERTS)]))


STEPS: dict[Any, Callable[[Walk], None]] = {
    **{op: plain(op) for op in (aten.clone.default, aten.contiguous.default, aten.neg.default, aten.relu.default)},
    aten.to.dtype: plain(aten.to.dtype, torch.float64),
    **{op: joined(op) for op in (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor)},
    **{op: times(op) for op in (aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor)},
    **{op: number(op) for op in (aten.mul.Scalar, aten.mul_.Scalar, aten.div.Scalar)},
    **{op: views(op) for op in (aten.view.default, aten.reshape.default, aten._unsafe_view.default)},
    **{op: pieces(op) for op in (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes,
                                 aten.chunk.default, aten.unbind.int)},
    operator.getitem: pieces(aten.chunk.default),
    aten.transpose.int: lambda w: w.move(aten.transpose.int, w.axis(), w.axis()),
    aten.permute.default: lambda w: w.move(
        aten.permute.default, torch.randperm(len(w.size), generator=w.drawing.generator).tolist()
    ),
    aten.movedim.int: lambda w: w.move(aten.movedim.int, w.axis(), w.axis()),
    aten.slice.Tensor: lambda w: w.move(aten.slice.Tensor, w.axis(), w.choose(2), 2**63 - 1, 1 + w.choose(2)),
    aten.select.int: lambda w: w.move(aten.select.int, w.axis(), 0),
    aten.unsqueeze.default: lambda w: w.move(aten.unsqueeze.default, w.choose(len(w.size) + 1)),
    aten.squeeze.dim: squeeze,
    aten.expand.default: lambda w: w.move(aten.expand.default, [2, *w.size]),
    aten.flatten.using_ints: lambda w: w.move(aten.flatten.using_ints, 0, w.axis()),
    aten.unflatten.int: lambda w: w.move(aten.unflatten.int, w.axis(), [1, -1]),
    aten.index.Tensor: index,
    aten.t.default: turned,
    ROUTED: mixture,
    COMBINED: mixture,
}  # fmt: skip
"""One step of a walk for every op that has a law."""


def test_every_law_is_walked() -> None:
    assert STEPS.keys() == LAWS.keys()


def let_through(program: Program, walk: Walk, what: Map) -> set[str] | None:
    """Names of the values that must carry the map, or None where a law stops it."""
    carrying = {"x"}
    for node, operand in walk.crossed:
        verdict = law(program, node, operand, what)
        if not isinstance(verdict, Passes):
            return None
        carrying |= {str(other.target) for other in verdict.joins if other.op == "get_attr"}
    return carrying


def agrees(walk: Walk, what: Map) -> bool | None:
    """Whether the map comes out where it should; None where a law stops it, or nothing is left."""
    program = walk.drawing.program(walk.node)
    carrying = let_through(program, walk, what)
    if carrying is None:
        return None
    assert carrying <= walk.carrying.keys()
    scale = torch.rand(WIDTH, generator=walk.drawing.generator, dtype=torch.float64) + 0.5
    m = matrix(what, walk.drawing.generator)

    def mapped(value: Tensor, labels: Tensor) -> Tensor:
        return value @ m if what in ROTATIONS else value * scale[labels.expand(value.shape)]

    tensors = walk.drawing.tensors
    before = run_float64(program, {name: value.clone() for name, value in tensors.items()})
    after = run_float64(program, {
        name: mapped(value, walk.carrying[name]) if name in carrying else value.clone()
        for name, value in tensors.items()
    })  # fmt: skip
    if not before.numel():
        return None
    return relative(after, mapped(before, walk.labels)) < EQUAL


@pytest.mark.parametrize("what", [SCALE, ROTATION, CENTRED], ids=lambda what: what.name.lower())
@pytest.mark.parametrize("target", list(STEPS), ids=str)
@settings(max_examples=8, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_what_the_laws_let_through_is_true(target: Any, what: Map, data: st.DataObject) -> None:
    walk = Walk(data.draw(st.integers(0, 2**31)), lambda n: data.draw(st.integers(0, n - 1)))
    others = data.draw(st.lists(st.sampled_from(list(STEPS)), max_size=3))
    place = data.draw(st.integers(0, len(others)))
    for step in (*others[:place], target, *others[place:]):
        if walk.size and walk.labels.numel():
            STEPS[step](walk)
    assert agrees(walk, what) is not False


@pytest.mark.parametrize("what", [SCALE, ROTATION, CENTRED], ids=lambda what: what.name.lower())
def test_some_walks_go_through(what: Map) -> None:
    """The property above would hold of laws that let nothing through."""
    through = set()
    for target in STEPS:
        for seed in range(12):
            generator = torch.Generator().manual_seed(seed)
            walk = Walk(seed, lambda n, g=generator: int(torch.randint(n, (), generator=g)))
            STEPS[target](walk)
            if agrees(walk, what):
                through.add(target)
    cut = {aten.t.default, aten.chunk.default, aten.unbind.int, aten.split.Tensor, aten.split.sizes,
           aten.split_with_sizes.default, operator.getitem, aten.transpose.int, aten.permute.default,
           aten.movedim.int, aten.relu.default, aten.flatten.using_ints, aten.unflatten.int}  # fmt: skip
    assert through == (set(STEPS) if what is SCALE else set(STEPS) - cut)
