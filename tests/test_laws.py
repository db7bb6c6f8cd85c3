"""The law table as behaviour: where a law lets a map pass, moving it changes nothing; where not, it would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from qc.compiler.execute import execute
from qc.compiler.laws import Map, Passes, law
from tests.programs import BATCH, LENGTH, Drawing, aten, relative, run_float64

WIDTH, HEADS = 8, 2
SCALE, ROTATION, CENTRED, HEAD = Map.SCALE, Map.ROTATION, Map.CENTRED, Map.HEAD
EQUAL, DIFFERENT = 1e-9, 1e-3
Draw = Callable[[Drawing, fx.Node, fx.Node], fx.Node]


def matrix(what: Map, generator: torch.Generator) -> Tensor:
    """A random map of each sort on WIDTH channels, as the matrix M of ``x M``."""
    noise = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    if what is SCALE:
        return torch.diag(noise[0].abs() + 0.3)
    if what is ROTATION:
        return torch.linalg.qr(noise)[0]
    if what is CENTRED:  # random on what is orthogonal to the all-ones vector, which it keeps
        ones = torch.cat([torch.ones(WIDTH, 1, dtype=torch.float64), noise[:, 1:]], 1)
        basis = torch.linalg.qr(ones)[0]
        inner = torch.linalg.qr(torch.randn(WIDTH - 1, WIDTH - 1, generator=generator, dtype=torch.float64))[
            0
        ]
        return basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner) @ basis.T
    return torch.block_diag(*(noise[i : i + 4, i : i + 4] for i in range(0, WIDTH, WIDTH // HEADS)))


def moved(draw: Draw, what: Map, seed: int) -> tuple[bool, float]:
    """Whether the law lets a map of the first operand through, and how far the two sides are apart."""
    drawing = Drawing(seed=seed)
    x, y = (drawing.value(name, *(BATCH, LENGTH, WIDTH)) for name in "xy")
    node = draw(drawing, x, y)
    program = drawing.program(node)
    verdict = law(program, node, x, what)
    carrying = {"x"} | ({str(n.target) for n in verdict.joins} if isinstance(verdict, Passes) else set())
    m = matrix(what, drawing.generator)
    before = run_float64(program, drawing.tensors)
    after = run_float64(
        program, {n: t @ m if n in carrying and t.dim() > 0 else t for n, t in drawing.tensors.items()}
    )
    if before.shape[-1] != WIDTH:
        return isinstance(verdict, Passes), float("inf")
    return isinstance(verdict, Passes), relative(after, before @ m)


def per_row(d: Drawing) -> fx.Node:
    return d.value("f", *(BATCH, LENGTH, 1))


def per_channel(d: Drawing) -> fx.Node:
    return d.value("c", WIDTH)


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
ON_ONES = ("plus one", "plus a factor per row")
"""Ops that add one number to all channels, which a rotation that keeps the all-ones vector lets through."""
OPS = LINEAR | SCALING | BLOCKING


@pytest.mark.parametrize("what", Map, ids=lambda what: what.name.lower())
@pytest.mark.parametrize("name", OPS)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_a_map_passes_exactly_where_moving_it_keeps_the_result(name: str, what: Map, seed: int) -> None:
    passes, error = moved(OPS[name], what, seed)
    assert passes == (
        name in LINEAR or (what is SCALE and name in SCALING) or (what is CENTRED and name in ON_ONES)
    )
    same = what is CENTRED and name == "quotient with itself"  # all ones, by accident
    assert error < EQUAL if passes or same else error > DIFFERENT


def test_a_bias_joins_a_sum_and_can_not_be_rewritten() -> None:
    d = Drawing()
    bias = per_channel(d)
    node = d.op(aten.add.Tensor, d.value("x", *(BATCH, LENGTH, WIDTH)), bias)
    (x, _) = node.all_input_nodes
    verdict = law(d.program(node), node, x, SCALE)
    assert isinstance(verdict, Passes)
    assert verdict.joins == (bias,)


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
    x = drawing.value("x", WIDTH if "index" in name else BATCH, WIDTH, WIDTH)
    node = draw(drawing, x, x)
    program = drawing.program(node)
    assert isinstance(law(program, node, x, ROTATION), Passes) == passes
    q = matrix(ROTATION, drawing.generator)
    before = run_float64(program, drawing.tensors)
    after = run_float64(program, drawing.tensors | {"x": drawing.tensors["x"] @ q})
    same = before.shape[-1] == WIDTH and relative(after, before @ q) < EQUAL
    assert same == passes


def test_an_index_is_not_the_value_it_picks() -> None:
    d = Drawing()
    x, order = d.value("x", *(WIDTH, WIDTH)), index(d)
    node = d.op(aten.index.Tensor, x, [order])
    program = d.program(node)
    assert all(not isinstance(law(program, node, order, what), Passes) for what in Map)
    assert isinstance(law(program, node, x, SCALE), Passes)


def test_attention_is_linear_in_its_values_head_by_head_and_in_nothing_else() -> None:
    d = Drawing()
    size = (BATCH, HEADS, LENGTH, 4)
    q, k, v = (d.value(name, *size) for name in "qkv")
    node = d.attention(q, k, v)
    program = d.program(node)
    per_head = d.random(HEADS, 4, 4)
    scale = torch.diag_embed(d.random(HEADS, 4).abs() + 0.3)
    before = run_float64(program, d.tensors)
    for what, m in ((HEAD, per_head), (SCALE, scale)):
        for operand in (q, k, v):
            name = str(operand.target)
            changed = torch.einsum("bhsd,hde->bhse", d.tensors[name], m)
            error = relative(
                run_float64(program, d.tensors | {name: changed}), torch.einsum("bshd,hde->bshe", before, m)
            )
            passes = isinstance(law(program, node, operand, what), Passes)
            assert passes == (operand is v)
            assert error < EQUAL if passes else error > DIFFERENT
    assert not isinstance(law(program, node, v, ROTATION), Passes)


def test_attention_blocks_values_that_are_its_keys_too() -> None:
    d = Drawing()
    q, kv = (d.value(name, *(BATCH, HEADS, LENGTH, 4)) for name in ("q", "kv"))
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


@pytest.mark.parametrize("what", [ROTATION, CENTRED], ids=["any rotation", "one that keeps ones"])
@pytest.mark.parametrize("unit", [False, True], ids=["gain", "unit gain"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_lets_a_rotation_through_when_its_gain_is_one(name: str, unit: bool, what: Map) -> None:
    options = NORMS[name]
    d = Drawing()
    x = d.value("x", *(BATCH, LENGTH, 2, 4) if name == "over a head" else (BATCH, LENGTH, WIDTH))
    if name == "over a head":
        x = d.op(aten.view.default, x, [BATCH, LENGTH, WIDTH])
    node = d.norm("n", x, **options)
    node.meta["unit"] = unit
    program = d.program(node)
    passes = isinstance(law(program, node, x, what), Passes)
    fits = name != "over a head" and (what is CENTRED or not options.get("mean"))
    assert passes == (fits and (unit or not options.get("weight", True)))
    if unit and options.get("weight", True):
        d.tensors["n.weight"] = torch.full_like(d.tensors["n.weight"], 1 - options.get("offset", 0.0))
    if name != "over a head":
        q = matrix(what, d.generator)
        before = run_float64(program, d.tensors)
        turned = d.tensors | {"x": d.tensors["x"] @ q}
        if options.get("bias"):  # the norm writes its bias into the space, so it turns as any writer does
            turned["n.bias"] = d.tensors["n.bias"] @ q
        error = relative(run_float64(program, turned), before @ q)
        assert error < EQUAL if passes else error > DIFFERENT
    for other in (SCALE, HEAD):
        assert not isinstance(law(program, node, x, other), Passes)


def test_a_box_lets_nothing_through() -> None:
    d = Drawing()
    x = d.value("x", *(BATCH, LENGTH, WIDTH))
    node = d.opaque("box", x)
    program = d.program(node)
    assert all(not isinstance(law(program, node, x, what), Passes) for what in Map)


def test_execution_of_a_drawing_is_what_torch_computes() -> None:
    d = Drawing()
    x = d.value("x", *(BATCH, LENGTH, WIDTH))
    program = d.program(d.linear("a", x, 4, bias=True))
    want = d.tensors["x"] @ d.tensors["a.weight"].T + d.tensors["a.bias"]
    (part,) = program.blocks
    node = next(n for n in program.graph.nodes if n.target == "a")
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    found = execute(program, part, d.tensors, {d.ids: ids}, dtype=torch.float64)
    assert torch.equal(found[node], want)
