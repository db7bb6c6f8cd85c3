"""A graph with Llama's names and other wiring does not match, and the nearest miss says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import fx

from qc.compiler.pattern import Site
from qc.compiler.program import Program
from qc.patterns.linear_linear import linear_linear
from qc.patterns.norm_linear import norm_linear
from qc.patterns.ov import ov, ov_heads
from qc.patterns.up_down import up_down
from tests.programs import Drawing, aten

MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"
Wiring = Callable[[Drawing, fx.Node], fx.Node]


def mlp(product: Callable[[Drawing, fx.Node, fx.Node], fx.Node], then: Wiring = lambda d, x: x) -> Program:
    """A decoder layer's MLP under Llama's names, with another product, and something more."""
    d = Drawing()
    n = d.norm("model.layers.0.post_attention_layernorm", d.embedding("model.embed_tokens", 11, 16))
    up, gate = d.linear(f"{MLP}.up_proj", n, 24), d.linear(f"{MLP}.gate_proj", n, 24)
    return d.program(then(d, d.linear(f"{MLP}.down_proj", product(d, up, gate), 16)))


def silu(d: Drawing, x: fx.Node) -> fx.Node:
    return d.op(aten.silu.default, x)


def mul(d: Drawing, x: Any, y: Any) -> fx.Node:
    return d.op(aten.mul.Tensor, x, y)


def read_again(d: Drawing, up: fx.Node, gate: fx.Node) -> fx.Node:
    product = mul(d, up, silu(d, gate))
    d.linear("model.layers.0.mlp.extra", product, 4)
    return product


def sum_read_again(d: Drawing, up: fx.Node, gate: fx.Node) -> fx.Node:
    return d.op(aten.add.Tensor, mul(d, up, silu(d, gate)), up)


def test_a_gated_product_under_llamas_names_matches_in_either_order() -> None:
    for product in (
        lambda d, up, gate: mul(d, up, silu(d, gate)),
        lambda d, up, gate: mul(d, silu(d, gate), up),
    ):
        (match,) = up_down.find(mlp(product))
        assert match.up == Site(f"{MLP}.up_proj")
        assert match.down == Site(f"{MLP}.down_proj")
        assert match.gate_writers == (Site(f"{MLP}.gate_proj"),)


def test_two_linears_that_are_multiplied_match_both_ways() -> None:
    found = up_down.find(mlp(mul))
    assert {match.up.module for match in found} == {f"{MLP}.up_proj", f"{MLP}.gate_proj"}


@pytest.mark.parametrize(
    ("product", "reason"),
    [
        (lambda d, up, gate: mul(d, up, d.op(aten.sigmoid.default, up)), "more than casts"),
        (lambda d, up, gate: mul(d, up, d.op(aten.neg.default, up)), "enters twice"),
        (lambda d, up, gate: mul(d, up, d.op(aten.clone.default, up)), "enters twice"),
        (lambda d, up, gate: mul(d, up, up), "no product of two values"),
        (lambda d, up, gate: mul(d, up, d.op(aten.relu.default, up)), "more than casts"),
        (sum_read_again, "more than casts"),
        (read_again, "another linear reads it"),
        (lambda d, up, gate: d.op(aten.add.Tensor, mul(d, up, silu(d, gate)), 1.0), "a constant is added"),
        (lambda d, up, gate: silu(d, mul(d, up, silu(d, gate))), "silu"),
        (lambda d, up, gate: d.op(aten.add.Tensor, up, silu(d, gate)), "no product of two values"),
        (lambda d, up, gate: mul(d, silu(d, up), silu(d, gate)), "no product of two values"),
    ],
    ids=[
        "h * sigmoid(h)", "h * -h", "h * copy of h", "h * h", "h * relu(h)", "up read beside",
        "product read twice",
        "plus one", "silu after", "sum", "both behind silu",
    ],
)  # fmt: skip
def test_llamas_mlp_names_on_other_wiring_do_not_match(product: Any, reason: str) -> None:
    program = mlp(product)
    assert up_down.find(program) == ()
    misses = [up_down.nearest(program), up_down.nearest(program, at=MLP)]
    assert all(miss is not None and not miss for miss in misses)
    assert any(reason in miss.reason for miss in misses if miss is not None)


def test_a_scale_passes_a_factor_per_channel_and_an_affine_gate() -> None:
    def product(d: Drawing, up: fx.Node, gate: fx.Node) -> fx.Node:
        scaled = mul(d, mul(d, up, silu(d, gate)), d.constant("factor", d.random(24)))
        return d.op(aten.div.Tensor, d.op(aten.relu.default, scaled), 3.0)

    assert len(up_down.find(mlp(product))) == 1


def packed(read_whole: bool, overlap: bool = False) -> Program:
    d = Drawing()
    both = d.linear("gate_up", d.embedding("embed", 11, 16), 48)
    up = d.op(aten.slice.Tensor, both, 2, 24, 48)
    gate = silu(d, d.op(aten.slice.Tensor, both, 2, 0, 24 + 8 * overlap))
    product = mul(d, up, d.op(aten.slice.Tensor, gate, 2, 0, 24) if overlap else gate)
    down = d.linear("down", product, 16)
    if read_whole:
        down = d.op(aten.add.Tensor, down, d.linear("other", d.op(aten.tanh.default, both), 16))
    return d.program(down)


def test_the_channels_of_a_packed_linear_must_not_be_read_another_way() -> None:
    (match,) = up_down.find(packed(read_whole=False))
    assert match.up == Site("gate_up", tuple(range(24, 48)))
    for program in (packed(read_whole=True), packed(read_whole=False, overlap=True)):
        assert up_down.find(program) == ()
        miss = up_down.nearest(program)
        assert miss is not None
        assert "the same channels in another way" in miss.reason


def attention(
    values: Callable[[Drawing, fx.Node, fx.Node, fx.Node], fx.Node] = lambda d, q, k, v: d.attention(q, k, v),
    then: Callable[[Drawing, fx.Node], fx.Node] = lambda d, x: d.flat(x),
    beside: Callable[[Drawing, fx.Node], fx.Node | None] = lambda d, v: None,
) -> Program:
    """A layer's attention under Llama's names, with other things in between."""
    d = Drawing()
    n = d.norm("model.layers.0.input_layernorm", d.embedding("model.embed_tokens", 11, 16))
    q, k, v = (d.linear(f"{ATTENTION}.{name}_proj", n, 16) for name in "qkv")
    out = d.linear(f"{ATTENTION}.o_proj", then(d, values(d, *(d.heads(x, 4) for x in (q, k, v)))), 16)
    more = beside(d, v)
    return d.program(out if more is None else d.op(aten.add.Tensor, out, more))


def sideways(d: Drawing, x: fx.Node) -> fx.Node:
    return d.flat(d.op(aten.transpose.int, x, 2, 3))


def test_the_reader_of_an_attention_may_hold_its_channels_in_any_order() -> None:
    (match,) = ov.find(attention(then=sideways))
    assert match.o == Site(f"{ATTENTION}.o_proj", tuple((c % 4) * 4 + c // 4 for c in range(16)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"beside": lambda d, v: v}, "more than casts"),
        ({"beside": lambda d, v: d.linear("other", v, 16)}, "a linear reads it too"),
        ({"values": lambda d, q, k, v: d.attention(q, v, v)}, "enters twice"),
        ({"values": lambda d, q, k, v: d.attention(v, k, d.op(aten.clone.default, v))}, "enters twice"),
        ({"values": lambda d, q, k, v: d.attention(q, k, d.op(aten.tanh.default, v))}, "no attention"),
        ({"then": lambda d, x: silu(d, d.flat(x))}, "silu"),
        ({"then": lambda d, x: d.op(aten.softmax.int, d.flat(x), -1)}, "softmax"),
        ({"then": lambda d, x: d.op(aten.slice.Tensor, d.flat(x), 2, 0, 8)}, "every channel exactly once"),
    ],
    ids=[
        "v on the residual", "v read by a linear", "k is v", "q is v", "tanh of v", "silu", "softmax", "half"
    ],
)  # fmt: skip
def test_llamas_attention_names_on_other_wiring_do_not_match(options: Any, reason: str) -> None:
    program = attention(**options)
    for pattern in (ov, ov_heads):
        assert pattern.find(program) == ()
        misses = [
            pattern.nearest(program),
            *(pattern.nearest(program, f"{ATTENTION}.{n}_proj") for n in "qkvo"),
        ]
        assert any(reason in miss.reason for miss in misses if miss is not None)


def test_a_gate_after_attention_lets_a_scale_through_and_a_head_matrix_not() -> None:
    def gated(d: Drawing, x: fx.Node) -> fx.Node:
        return mul(d, d.flat(x), d.constant("gate", d.random(16)))

    program = attention(then=gated)
    assert len(ov.find(program)) == 1
    assert ov_heads.find(program) == ()
    miss = ov_heads.nearest(program)
    assert miss is not None
    assert "channel by channel" in miss.reason


@pytest.mark.parametrize(
    ("beside", "matches"),
    [
        (lambda d, n: None, 1),
        (lambda d, n: d.linear("model.layers.0.mlp.gate_proj", n, 16), 1),
        (silu, 0),
        (lambda d, n: n, 0),
        (lambda d, n: d.norm("again", n), 0),
        (lambda d, n: d.linear("narrow", d.op(aten.slice.Tensor, n, 2, 0, 8), 16), 0),
    ],
    ids=["alone", "two linears", "silu", "the residual", "another norm", "half of it"],
)  # fmt: skip
def test_a_norm_is_smoothed_only_when_linears_alone_read_all_of_it(beside: Any, matches: int) -> None:
    d = Drawing()
    n = d.norm("model.layers.0.input_layernorm", d.embedding("model.embed_tokens", 11, 16))
    out, more = d.linear(f"{ATTENTION}.q_proj", n, 16), beside(d, n)
    program = d.program(out if more is None else d.op(aten.add.Tensor, out, more))
    names = [match.norm.module for match in norm_linear.find(program)]
    assert names.count("model.layers.0.input_layernorm") == matches


@pytest.mark.parametrize(
    ("between", "matches"),
    [
        (lambda d, x: x, 1),
        (lambda d, x: d.flat(d.heads(x, 2)), 0),  # positions and channels are mixed
        (lambda d, x: d.op(aten.reshape.default, d.op(aten.clone.default, x), [2, 3, 12]), 1),
        (lambda d, x: d.op(aten.relu.default, x), 0),
        (lambda d, x: mul(d, x, 2.0), 0),
    ],
    ids=["directly", "heads without their transpose", "copy and view", "relu", "times two"],
)  # fmt: skip
def test_two_linears_in_a_row(between: Wiring, matches: int) -> None:
    d = Drawing()
    first = d.linear("first", d.embedding("embed", 11, 16), 12)
    assert len(linear_linear.find(d.program(d.linear("second", between(d, first), 4)))) == matches
