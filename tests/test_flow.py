"""Following channels: what flows from a linear to a reader can be taken back there; the rest is stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from qc.compiler.edit import Edit, Verb, apply
from qc.compiler.flow import follow, space
from qc.compiler.laws import Map
from qc.compiler.operand import Hadamard, Slot, Vector
from qc.compiler.pattern import Site
from qc.compiler.program import Program
from tests.programs import BATCH, LENGTH, Drawing, aten, relative, run_float64

WIDTH, HEADS = 8, 2
SCALE, ROTATION, HEAD = Map.SCALE, Map.ROTATION, Map.HEAD
EQUAL = 1e-9


@dataclass(frozen=True)
class Step:
    """One op of a chain, and the maps that may cross it."""

    name: str
    draw: Callable[[Drawing, fx.Node, int], fx.Node]
    lets: frozenset[Map]


BOTH, ONLY_SCALE, NONE = frozenset({SCALE, HEAD}), frozenset({SCALE}), frozenset[Map]()


def _gate(d: Drawing, x: fx.Node, i: int) -> fx.Node:
    return d.op(aten.mul.Tensor, d.value(f"gate{i}", *(BATCH, LENGTH, WIDTH)), x)


def _factor(d: Drawing, x: fx.Node, i: int) -> fx.Node:
    return d.op(aten.mul.Tensor, x, d.value(f"factor{i}", *(BATCH, LENGTH, 1)))


def _permuted(d: Drawing, x: fx.Node, i: int) -> fx.Node:
    view = d.op(aten.view.default, x, [BATCH, LENGTH, 2, WIDTH // 2])
    return d.op(aten.reshape.default, d.op(aten.transpose.int, view, 2, 3), [BATCH, LENGTH, WIDTH])


def _two_ways(d: Drawing, x: fx.Node, i: int) -> fx.Node:
    return d.op(aten.sub.Tensor, d.op(aten.mul.Tensor, x, 3.0), d.op(aten.neg.default, x))


def _attended(d: Drawing, x: fx.Node, i: int) -> fx.Node:
    q, k = (d.value(f"{name}{i}", *(BATCH, HEADS, LENGTH, 4)) for name in "qk")
    return d.flat(d.attention(q, k, d.heads(x, HEADS)))


STEPS = (
    Step("neg", lambda d, x, i: d.op(aten.neg.default, x), BOTH),
    Step("doubled", lambda d, x, i: d.op(aten.add.Tensor, x, x), BOTH),
    Step("per row", _factor, BOTH),
    Step("two ways", _two_ways, BOTH),
    Step("gate", _gate, ONLY_SCALE),
    Step("relu", lambda d, x, i: d.op(aten.relu.default, x), ONLY_SCALE),
    Step("silu", lambda d, x, i: d.op(aten.silu.default, x), NONE),
    Step("times its negative", lambda d, x, i: d.op(aten.mul.Tensor, x, d.op(aten.neg.default, x)), NONE),
    Step("times its relu", lambda d, x, i: d.op(aten.mul.Tensor, d.op(aten.relu.default, x), x), NONE),
    Step("plus itself permuted", lambda d, x, i: d.op(aten.add.Tensor, x, _permuted(d, x, i)), NONE),
    Step("times its first channel", lambda d, x, i: d.op(
        aten.mul.Tensor, x, d.op(aten.slice.Tensor, x, 2, 0, 1)), NONE),
)  # fmt: skip
PERMUTED = Step("permuted", _permuted, BOTH)
ATTENDED = Step("attended", _attended, BOTH)


def rewritten(
    program: Program, tensors: dict[str, Tensor], edits: list[Edit], values: Any
) -> dict[str, Tensor]:
    result = dict(tensors)
    for edit in edits:
        new = apply(program, edit.site.module, [edit], values, result.get, torch.float64)
        result |= {f"{edit.site.module}.{name}": tensor for name, tensor in new.items()}
    return result


def chain(steps: list[Step], seed: int, *, bias: bool) -> tuple[Drawing, Program, fx.Node]:
    d = Drawing(seed=seed)
    x = d.value("x", *(BATCH, LENGTH, 5))
    first = node = d.linear("first", x, WIDTH, bias=bias)
    for i, step in enumerate(steps):
        node = step.draw(d, node, i)
    return d, d.program(d.linear("second", node, 5)), first


@settings(max_examples=80)
@given(
    steps=st.lists(st.sampled_from((*STEPS, PERMUTED, ATTENDED)), max_size=4),
    seed=st.integers(0, 2**31), bias=st.booleans(),
)  # fmt: skip
def test_a_scale_that_flows_to_a_reader_is_taken_back_there(steps: list[Step], seed: int, bias: bool) -> None:
    d, program, first = chain(steps, seed, bias=bias)
    flow = follow(program, first, SCALE)
    assert (not flow.obstacles) == all(SCALE in step.lets for step in steps)
    if flow.obstacles:
        return
    (reader,) = flow.readers
    assert sorted(reader.labels) == list(range(WIDTH))
    where = tuple(reader.labels.index(c) for c in range(WIDTH))
    slot = Slot("s", (WIDTH,))
    edits = [
        Edit(Verb.SCALE_OUT, Site("first"), Vector(slot, inverse=True)),
        Edit(Verb.SCALE_IN, Site("second", where), Vector(slot)),
    ]
    scales = d.random(WIDTH).abs() + 0.3
    after = run_float64(program, rewritten(program, d.tensors, edits, {slot: scales}))
    assert relative(after, run_float64(program, d.tensors)) < EQUAL


@settings(max_examples=50)
@given(steps=st.lists(st.sampled_from((*STEPS, ATTENDED)), max_size=4), seed=st.integers(0, 2**31))
def test_a_matrix_per_head_that_flows_to_a_reader_is_taken_back_there(steps: list[Step], seed: int) -> None:
    d, program, first = chain(steps, seed, bias=True)
    flow = follow(program, first, HEAD)
    assert (not flow.obstacles) == all(HEAD in step.lets for step in steps)
    if flow.obstacles:
        return
    (reader,) = flow.readers
    assert reader.labels == tuple(range(WIDTH))
    rotation = Hadamard(WIDTH // HEADS, seed % 97, copies=HEADS)
    edits = [
        Edit(Verb.ROTATE_OUT, Site("first"), rotation),
        Edit(Verb.ROTATE_IN, Site("second"), rotation),
    ]
    after = run_float64(program, rewritten(program, d.tensors, edits, {}))
    assert relative(after, run_float64(program, d.tensors)) < EQUAL


def test_a_sum_with_another_value_stops_the_flow_and_names_it() -> None:
    d = Drawing()
    x = d.value("x", *(BATCH, LENGTH, 5))
    first, other = d.linear("first", x, WIDTH), d.linear("other", x, WIDTH)
    program = d.program(d.linear("second", d.op(aten.add.Tensor, first, other), 5))
    (obstacle,) = follow(program, first, SCALE).obstacles
    assert "other" in obstacle.reason
    assert obstacle.node.target is aten.add.Tensor


# The residual stream: everything that must turn together.


def stream(read: Callable[[Drawing, fx.Node], fx.Node]) -> Any:
    """The space of an embedding whose value a linear reads after ``read``."""
    d = Drawing()
    start = d.embedding("embed", 11, WIDTH)
    x = d.op(aten.add.Tensor, start, d.linear("write", d.linear("read", start, 6), WIDTH))
    return space(d.program(d.linear("head", read(d, x), 6)), start, ROTATION)


def test_the_space_of_a_rotation_holds_all_writers_and_readers() -> None:
    found = stream(lambda d, x: x)
    assert not found.obstacles
    assert [str(n.target) for n in found.writers] == ["embed", "write"]
    assert [str(n.target) for n in found.readers] == ["read", "head"]


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda d, x: d.op(aten.silu.default, x), "silu"),
        (lambda d, x: d.op(aten.cat.default, list(halves(d, x)), -1), "cut"),
        (lambda d, x: d.op(aten.mul.Tensor, x, d.value("c", WIDTH)), "channel by channel"),
        (lambda d, x: d.op(aten.add.Tensor, x, d.value("c", WIDTH)), "nothing can rewrite"),
        (lambda d, x: d.norm("norm", x), "gain"),
    ],
    ids=["silu", "chunk", "per channel", "bias", "norm"],
)  # fmt: skip
def test_whatever_else_uses_the_stream_is_an_obstacle_with_its_reason(read: Any, reason: str) -> None:
    assert any(reason in obstacle.reason for obstacle in stream(read).obstacles)


def halves(d: Drawing, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    node = d.graph.call_function(aten.chunk.default, (x, 2, -1))
    node.meta = {"val": aten.chunk.default(x.meta["val"], 2, -1), "part": 1}
    return d.op_of_list(node, 0), d.op_of_list(node, 1)
