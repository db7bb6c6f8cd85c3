"""The law table as behaviour: where a law lets a map pass, moving it changes nothing; where it blocks, it would."""

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
from qc.compiler.execute import execute
from qc.compiler.flow import follow, space
from qc.compiler.laws import Map, Passes, law
from qc.compiler.operand import Hadamard, Slot, Vector
from qc.compiler.pattern import Site
from qc.compiler.program import Program
from tests.programs import BATCH, LENGTH, Drawing, aten, run_float64

WIDTH, HEADS = 8, 2
SCALE, ROTATION, HEAD = Map.SCALE, Map.ROTATION, Map.HEAD
EQUAL, DIFFERENT = 1e-9, 1e-3
Draw = Callable[[Drawing, fx.Node, fx.Node], fx.Node]


def matrix(what: Map, generator: torch.Generator) -> Tensor:
    """A random map of each sort on WIDTH channels, as the matrix M of ``x M``."""
    noise = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    if what is SCALE:
        return torch.diag(noise[0].abs() + 0.3)
    if what is ROTATION:
        return torch.linalg.qr(noise)[0]
    return torch.block_diag(*(noise[i : i + 4, i : i + 4] for i in range(0, WIDTH, WIDTH // HEADS)))


def value(drawing: Drawing, name: str, size: tuple[int, ...]) -> fx.Node:
    """A value [BATCH, LENGTH, ...] that nothing computes."""
    return drawing.constant(name, drawing.random(*size))


def relative(got: Tensor, want: Tensor) -> float:
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))


def moved(draw: Draw, what: Map, seed: int) -> tuple[bool, float]:
    """Whether the law lets a map of the first operand through, and how far the two sides are apart."""
    drawing = Drawing(seed=seed)
    x, y = (value(drawing, name, (BATCH, LENGTH, WIDTH)) for name in "xy")
    node = draw(drawing, x, y)
    program = drawing.program(node)
    verdict = law(program, node, x, what)
    carrying = {"x"} | ({str(n.target) for n in verdict.joins} if isinstance(verdict, Passes) else set())
    m = matrix(what, drawing.generator)
    before = compute(program, drawing.tensors)
    after = compute(
        program, {n: t @ m if n in carrying and t.dim() > 0 else t for n, t in drawing.tensors.items()}
    )
    if before.shape[-1] != WIDTH:
        return isinstance(verdict, Passes), float("inf")
    return isinstance(verdict, Passes), relative(after, before @ m)


def compute(program: Program, tensors: dict[str, Tensor]) -> Tensor:
    return run_float64(program, tensors, torch.zeros(BATCH, LENGTH, dtype=torch.int64))


def per_row(d: Drawing) -> fx.Node:
    return value(d, "f", (BATCH, LENGTH, 1))


def per_channel(d: Drawing) -> fx.Node:
    return value(d, "c", (WIDTH,))


LINEAR: dict[str, Draw] = {
    "neg": lambda d, x, y: d.op(aten.neg.default, x),
    "clone": lambda d, x, y: d.op(aten.clone.default, x),
    "cast": lambda d, x, y: d.op(aten.to.dtype, x, torch.float64),
    "add": lambda d, x, y: d.op(aten.add.Tensor, x, y),
    "add as the second": lambda d, x, y: d.op(aten.add.Tensor, y, x),
    "add three times": lambda d, x, y: d.op(aten.add.Tensor, y, x, alpha=3),
    "sub": lambda d, x, y: d.op(aten.sub.Tensor, y, x),
    "double": lambda d, x, y: d.op(aten.add.Tensor, x, x),
    "times two": lambda d, x, y: d.op(aten.mul.Tensor, x, 2.0),
    "times a factor per row": lambda d, x, y: d.op(aten.mul.Tensor, per_row(d), x),
    "divided by two": lambda d, x, y: d.op(aten.div.Tensor, x, 2.0),
    "divided per row": lambda d, x, y: d.op(aten.div.Tensor, x, per_row(d)),
}
"""Ops that let every map through."""
SCALING: dict[str, Draw] = {
    "gate": lambda d, x, y: d.op(aten.mul.Tensor, y, x),
    "times a factor per channel": lambda d, x, y: d.op(aten.mul.Tensor, x, per_channel(d)),
    "divided by a value": lambda d, x, y: d.op(aten.div.Tensor, x, y),
    "relu": lambda d, x, y: d.op(aten.relu.default, x),
}
"""Ops that let scales through and nothing else."""
BLOCKING: dict[str, Draw] = {
    "plus one": lambda d, x, y: d.op(aten.add.Tensor, x, 1.0),
    "plus a factor per row": lambda d, x, y: d.op(aten.add.Tensor, x, per_row(d)),
    "square": lambda d, x, y: d.op(aten.mul.Tensor, x, x),
    "quotient with itself": lambda d, x, y: d.op(aten.div.Tensor, x, x),
    "denominator": lambda d, x, y: d.op(aten.div.Tensor, y, x),
    "silu": lambda d, x, y: d.op(aten.silu.default, x),
    "gelu": lambda d, x, y: d.op(aten.gelu.default, x),
    "tanh": lambda d, x, y: d.op(aten.tanh.default, x),
    "sigmoid": lambda d, x, y: d.op(aten.sigmoid.default, x),
    "softmax": lambda d, x, y: d.op(aten.softmax.int, x, -1),
    "power": lambda d, x, y: d.op(aten.pow.Tensor_Scalar, x, 2),
    "flip": lambda d, x, y: d.op(aten.flip.default, x, [2]),
}
"""Ops that let nothing through."""
OPS = LINEAR | SCALING | BLOCKING


@pytest.mark.parametrize("what", Map, ids=lambda what: what.name.lower())
@pytest.mark.parametrize("name", OPS)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_a_map_passes_exactly_where_moving_it_keeps_the_result(name: str, what: Map, seed: int) -> None:
    passes, error = moved(OPS[name], what, seed)
    assert passes == (name in LINEAR or (what is SCALE and name in SCALING))
    assert error < EQUAL if passes else error > DIFFERENT


def test_a_bias_joins_a_sum_and_can_not_be_rewritten() -> None:
    d = Drawing()
    bias = per_channel(d)
    node = d.op(aten.add.Tensor, value(d, "x", (BATCH, LENGTH, WIDTH)), bias)
    x = node.args[0]
    verdict = law(d.program(node), node, x, SCALE)
    assert isinstance(verdict, Passes) and verdict.joins == (bias,)


ROWS: dict[str, tuple[bool, Draw]] = {
    "flatten rows": (True, lambda d, x, y: d.op(aten.view.default, x, [BATCH * WIDTH, WIDTH])),
    "reshape rows": (True, lambda d, x, y: d.op(aten.reshape.default, x, [1, BATCH, WIDTH, WIDTH])),
    "slice of rows": (True, lambda d, x, y: d.op(aten.slice.Tensor, x, 1, 1, 3)),
    "one row": (True, lambda d, x, y: d.op(aten.select.int, x, 1, 2)),
    "new axis before": (True, lambda d, x, y: d.op(aten.unsqueeze.default, x, 1)),
    "rows by index": (True, lambda d, x, y: d.op(aten.index.Tensor, x, [index(d)])),
    "one channel": (False, lambda d, x, y: d.op(aten.select.int, x, 2, 2)),
    "one channel, from the end": (False, lambda d, x, y: d.op(aten.select.int, x, -1, 2)),
    "channels by index": (False, lambda d, x, y: d.op(aten.index.Tensor, x, [None, None, index(d)])),
    "transpose": (False, lambda d, x, y: d.op(aten.transpose.int, x, 1, 2)),
    "heads": (False, lambda d, x, y: d.op(aten.view.default, x, [BATCH, WIDTH, HEADS, -1])),
    "half": (False, lambda d, x, y: d.op(aten.slice.Tensor, x, 2, 0, 4)),
}
"""Layout ops, on a value with as many positions as channels, so that no axis is told by its size."""


def index(d: Drawing) -> fx.Node:
    node = d.constant("order", torch.arange(WIDTH).flip(0) % BATCH)
    d.tensors["order"] = torch.arange(WIDTH).flip(0)
    return node


@pytest.mark.parametrize("name", ROWS)
def test_a_rotation_passes_layout_ops_that_act_on_rows(name: str) -> None:
    passes, draw = ROWS[name]
    drawing = Drawing(batch=BATCH, length=WIDTH)
    x = value(drawing, "x", (WIDTH if "index" in name else BATCH, WIDTH, WIDTH))
    node = draw(drawing, x, x)
    program = drawing.program(node)
    assert isinstance(law(program, node, x, ROTATION), Passes) == passes
    q = matrix(ROTATION, drawing.generator)
    before = compute(program, drawing.tensors)
    after = compute(program, drawing.tensors | {"x": drawing.tensors["x"] @ q})
    same = before.shape[-1] == WIDTH and relative(after, before @ q) < EQUAL
    assert same == passes


def test_an_index_is_not_the_value_it_picks() -> None:
    d = Drawing()
    x, order = value(d, "x", (WIDTH, WIDTH)), index(d)
    node = d.op(aten.index.Tensor, x, [order])
    program = d.program(node)
    assert all(not isinstance(law(program, node, order, what), Passes) for what in Map)
    assert isinstance(law(program, node, x, SCALE), Passes)


def test_attention_is_linear_in_its_values_head_by_head_and_in_nothing_else() -> None:
    d = Drawing()
    size = (BATCH, HEADS, LENGTH, 4)
    q, k, v = (value(d, name, size) for name in "qkv")
    node = d.attention(q, k, v)
    program = d.program(node)
    per_head = d.random(HEADS, 4, 4)
    scale = torch.diag_embed(d.random(HEADS, 4).abs() + 0.3)
    before = compute(program, d.tensors)
    for what, m in ((HEAD, per_head), (SCALE, scale)):
        for operand in (q, k, v):
            name = str(operand.target)
            changed = torch.einsum("bhsd,hde->bhse", d.tensors[name], m)
            error = relative(
                compute(program, d.tensors | {name: changed}), torch.einsum("bshd,hde->bshe", before, m)
            )
            passes = isinstance(law(program, node, operand, what), Passes)
            assert passes == (operand is v)
            assert error < EQUAL if passes else error > DIFFERENT
    assert not isinstance(law(program, node, v, ROTATION), Passes)


def test_attention_blocks_values_that_are_its_keys_too() -> None:
    d = Drawing()
    q, kv = (value(d, name, (BATCH, HEADS, LENGTH, 4)) for name in ("q", "kv"))
    node = d.attention(q, kv, kv)
    assert not isinstance(law(d.program(node), node, kv, SCALE), Passes)


NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offset": {"offset": 1.0},
    "without a gain": {"weight": False},
    "mean subtracting": {"mean": True},
    "with a bias": {"bias": True},
    "over a head": {"width": 4},
}


@pytest.mark.parametrize("unit", [False, True], ids=["gain", "unit gain"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_lets_a_rotation_through_when_it_is_plain_and_its_gain_is_one(name: str, unit: bool) -> None:
    options = NORMS[name]
    d = Drawing()
    x = value(d, "x", (BATCH, LENGTH, 2, 4) if name == "over a head" else (BATCH, LENGTH, WIDTH))
    if name == "over a head":
        x = d.op(aten.view.default, x, [BATCH, LENGTH, WIDTH])
    node = d.norm("n", x, **options)
    node.meta["unit"] = unit
    program = d.program(node)
    passes = isinstance(law(program, node, x, ROTATION), Passes)
    assert passes == (name in ("plain", "offset", "without a gain") and (unit or name == "without a gain"))
    if unit and options.get("weight", True):
        d.tensors["n.weight"] = torch.full_like(d.tensors["n.weight"], 1 - options.get("offset", 0.0))
    if name != "over a head":
        q = matrix(ROTATION, d.generator)
        before = compute(program, d.tensors)
        error = relative(compute(program, d.tensors | {"x": d.tensors["x"] @ q}), before @ q)
        assert error < EQUAL if passes else error > DIFFERENT
    for what in (SCALE, HEAD):
        assert not isinstance(law(program, node, x, what), Passes)


def test_a_box_lets_nothing_through() -> None:
    d = Drawing()
    x = value(d, "x", (BATCH, LENGTH, WIDTH))
    node = d.opaque("box", x)
    program = d.program(node)
    assert all(not isinstance(law(program, node, x, what), Passes) for what in Map)


# Chains of ops between a linear that writes and one that reads, rewritten by the real edits.


@dataclass(frozen=True)
class Step:
    """One op of a chain, and the maps that may cross it."""

    name: str
    draw: Callable[[Drawing, fx.Node, int], fx.Node]
    lets: frozenset[Map]


BOTH, ONLY_SCALE, NONE = frozenset({SCALE, HEAD}), frozenset({SCALE}), frozenset[Map]()


def _gate(d: Drawing, x: fx.Node, i: int) -> fx.Node:
    return d.op(aten.mul.Tensor, value(d, f"gate{i}", (BATCH, LENGTH, WIDTH)), x)


def _factor(d: Drawing, x: fx.Node, i: int) -> fx.Node:
    return d.op(aten.mul.Tensor, x, value(d, f"factor{i}", (BATCH, LENGTH, 1)))


def _permuted(d: Drawing, x: fx.Node, i: int) -> fx.Node:
    view = d.op(aten.view.default, x, [BATCH, LENGTH, 2, WIDTH // 2])
    return d.op(aten.reshape.default, d.op(aten.transpose.int, view, 2, 3), [BATCH, LENGTH, WIDTH])


def _two_ways(d: Drawing, x: fx.Node, i: int) -> fx.Node:
    return d.op(aten.sub.Tensor, d.op(aten.mul.Tensor, x, 3.0), d.op(aten.neg.default, x))


def _attended(d: Drawing, x: fx.Node, i: int) -> fx.Node:
    q, k = (value(d, f"{name}{i}", (BATCH, HEADS, LENGTH, 4)) for name in "qk")
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
    x = value(d, "x", (BATCH, LENGTH, 5))
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
    after = compute(program, rewritten(program, d.tensors, edits, {slot: scales}))
    assert relative(after, compute(program, d.tensors)) < EQUAL


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
    after = compute(program, rewritten(program, d.tensors, edits, {}))
    assert relative(after, compute(program, d.tensors)) < EQUAL


def test_a_sum_with_another_value_stops_the_flow_and_names_it() -> None:
    d = Drawing()
    x = value(d, "x", (BATCH, LENGTH, 5))
    first, other = d.linear("first", x, WIDTH), d.linear("other", x, WIDTH)
    program = d.program(d.linear("second", d.op(aten.add.Tensor, first, other), 5))
    (obstacle,) = follow(program, first, SCALE).obstacles
    assert "other" in obstacle.reason and obstacle.node.target is aten.add.Tensor


# The residual stream: everything that must turn together.


def stream(read: Callable[[Drawing, fx.Node], fx.Node]) -> Any:
    """The space of an embedding whose value a linear reads after ``read``."""
    d = Drawing()
    x = d.embedding("embed", 11, WIDTH)
    x = d.op(aten.add.Tensor, x, d.linear("write", d.linear("read", x, 6), WIDTH))
    return space(d.program(d.linear("head", read(d, x), 6)), x.args[0], ROTATION)


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
        (lambda d, x: d.op(aten.mul.Tensor, x, per_channel(d)), "channel by channel"),
        (lambda d, x: d.op(aten.add.Tensor, x, per_channel(d)), "nothing can rewrite"),
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


def test_execution_of_a_drawing_is_what_torch_computes() -> None:
    d = Drawing()
    x = value(d, "x", (BATCH, LENGTH, WIDTH))
    program = d.program(d.linear("a", x, 4, bias=True))
    want = d.tensors["x"] @ d.tensors["a.weight"].T + d.tensors["a.bias"]
    (part,) = program.blocks
    node = next(n for n in program.graph.nodes if n.target == "a")
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    found = execute(program, part, d.tensors, {d.ids: ids}, dtype=torch.float64)
    assert torch.equal(found[node], want)
