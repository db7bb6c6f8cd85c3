"""The weight side of every edit against plain dense float64 linear algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qc.compiler.edit import VERBS, Edit, Verb, apply, by_module
from qc.compiler.errors import Failed
from qc.compiler.operand import Gain, Hadamard, Kronecker, Operand, Slot, Vector, factors, stored_factors
from qc.compiler.pattern import Site
from qc.compiler.program import Program
from qc.runtime.hadamard import has_hadamard
from qc.runtime.kronecker import rotate
from tests.programs import Drawing

ROWS, COLUMNS = 6, 8
SEEDS = st.integers(0, 2**31)


def module(
    kind: str, *, seed: int, out: int = ROWS, width: int = COLUMNS, bias: bool = True, **options: Any
) -> tuple[Program, dict[str, Tensor]]:
    """A program with one module ``m`` and its random float64 tensors."""
    d = Drawing(seed=seed)
    x = d.constant("x", d.random(2, 3, width))
    if kind == "norm":
        node = d.norm("m", x, bias=bias, **options)
    elif kind == "embedding":
        node = d.embedding("m", out, width)
    else:
        node = d.linear("m", x, out, bias=bias, **options)
    return d.program(node), d.tensors


def edited(
    made: tuple[Program, dict[str, Tensor]], verb: Verb, operand: Operand = None,
    values: Any = None, channels: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    program, tensors = made
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    edit = Edit(verb, Site("m", channels), operand)
    result = apply(program, "m", [edit], values or {}, tensors.get, torch.float64)
    assert all(torch.equal(tensors[name], before[name]) for name in before), "an edit changed what it read"
    return result


def slot(size: int, seed: int) -> tuple[Slot, dict[Slot, Tensor]]:
    """An unknown of this size and a positive value for it."""
    name = Slot("s", (size,))
    return name, {name: torch.rand(size, generator=torch.Generator().manual_seed(seed)) + 0.5}


def dense(rotation: Hadamard) -> Tensor:
    """The matrix Q that a described rotation stands for."""
    return rotation.times(torch.eye(rotation.width, dtype=torch.float64))


def close(got: Tensor, want: Tensor) -> bool:
    return got.dtype == torch.float64 and torch.allclose(got, want, rtol=1e-12, atol=1e-12)


CHANNELS = st.permutations(range(ROWS)).flatmap(
    lambda order: st.integers(1, ROWS).map(lambda n: tuple(order[:n]))
)


@given(seed=SEEDS, transposed=st.booleans(), channels=st.none() | CHANNELS, inverse=st.booleans())
def test_scale_out_scales_the_rows_and_the_bias(
    seed: int, transposed: bool, channels: tuple[int, ...] | None, inverse: bool
) -> None:
    made = module("linear", seed=seed, transposed=transposed)
    name, values = slot(len(channels or range(ROWS)), seed)
    got = edited(made, Verb.SCALE_OUT, Vector(name, inverse=inverse), values, channels)
    s = torch.ones(ROWS, dtype=torch.float64)
    s[list(channels or range(ROWS))] = values[name].double()
    s = 1 / s if inverse else s
    weight = made[1]["m.weight"]
    assert close(got["weight"], weight * s if transposed else s[:, None] * weight)
    assert close(got["bias"], made[1]["m.bias"] * s)


@given(seed=SEEDS, transposed=st.booleans(), order=st.permutations(range(COLUMNS)), partial=st.booleans())
def test_scale_in_scales_the_columns_and_leaves_the_bias(
    seed: int, transposed: bool, order: list[int], partial: bool
) -> None:
    channels = tuple(order[:3] if partial else order)
    made = module("linear", seed=seed, transposed=transposed)
    name, values = slot(len(channels), seed)
    got = edited(made, Verb.SCALE_IN, Vector(name), values, channels)
    s = torch.ones(COLUMNS, dtype=torch.float64)
    s[list(channels)] = values[name].double()
    weight = made[1]["m.weight"]
    assert close(got["weight"], s[:, None] * weight if transposed else weight * s)
    assert torch.equal(got["bias"], made[1]["m.bias"])


@given(seed=SEEDS, kv=st.integers(1, 3), repeat=st.integers(1, 3), head_dim=st.integers(1, 4))
def test_a_scale_of_a_value_head_goes_to_all_its_query_heads(
    seed: int, kv: int, repeat: int, head_dim: int
) -> None:
    width = kv * repeat * head_dim
    made = module("linear", seed=seed, width=width)
    name, values = slot(kv * head_dim, seed)
    got = edited(made, Verb.SCALE_IN, Vector(name, groups=(kv, head_dim), repeat=repeat), values)
    s = values[name].double().tolist()
    per_column = [s[(h // repeat) * head_dim + c] for h in range(kv * repeat) for c in range(head_dim)]
    assert close(got["weight"], made[1]["m.weight"] * torch.tensor(per_column, dtype=torch.float64))


@given(seed=SEEDS, offset=st.sampled_from([0.0, 1.0]), bias=st.booleans())
def test_scaling_a_norm_scales_its_gain_not_its_weight(seed: int, offset: float, bias: bool) -> None:
    made = module("norm", seed=seed, offset=offset, bias=bias)
    name, values = slot(COLUMNS, seed)
    got = edited(made, Verb.SCALE_OUT, Vector(name), values)
    s = values[name].double()
    assert close(got["weight"] + offset, (made[1]["m.weight"] + offset) * s)
    assert ("bias" in got) == bias
    if bias:
        assert close(got["bias"], made[1]["m.bias"] * s)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_set_unit_makes_the_gain_one(offset: float) -> None:
    got = edited(module("norm", seed=0, offset=offset, bias=False), Verb.SET_UNIT)
    assert torch.equal(got["weight"] + offset, torch.ones(COLUMNS, dtype=torch.float64))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_gain_is_the_weight_and_its_offset_in_the_state_before(offset: float) -> None:
    program, tensors = module("linear", seed=1)
    tensors["n.weight"] = torch.linspace(-1, 2, COLUMNS, dtype=torch.float64)
    got = edited((program, tensors), Verb.SCALE_IN, Gain("n", offset))
    assert close(got["weight"], tensors["m.weight"] * (tensors["n.weight"] + offset))


def test_a_gain_of_a_norm_without_weight_fails_with_its_name() -> None:
    with pytest.raises(Failed, match="other has no weight"):
        edited(module("linear", seed=1), Verb.SCALE_IN, Gain("other", 0.0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_shift_leaves_the_norm_and_comes_back_in_the_reader(bias: bool, transposed: bool) -> None:
    name, values = slot(COLUMNS, 3)
    z = values[name].double()
    norm = module("norm", seed=2, bias=bias)
    shifted = edited(norm, Verb.SHIFT_OUT, Vector(name), values)
    assert close(shifted["bias"], (norm[1]["m.bias"] if bias else torch.zeros_like(z)) - z)
    assert torch.equal(shifted["weight"], norm[1]["m.weight"])
    linear = module("linear", seed=3, bias=bias, transposed=transposed)
    got = edited(linear, Verb.SHIFT_IN, Vector(name), values)
    weight = linear[1]["m.weight"].T if transposed else linear[1]["m.weight"]
    old = linear[1].get("m.bias", torch.zeros(ROWS, dtype=torch.float64))
    assert close(got["bias"], old + weight @ z)
    assert torch.equal(got["weight"], linear[1]["m.weight"])


def test_edits_of_one_module_are_applied_in_order() -> None:
    program, tensors = module("linear", seed=4)
    name, values = slot(COLUMNS, 4)
    shift, scale = Edit(Verb.SHIFT_IN, Site("m"), Vector(name)), Edit(Verb.SCALE_IN, Site("m"), Vector(name))
    z = values[name].double()
    got = apply(program, "m", [shift, scale], values, tensors.get, torch.float64)
    assert close(got["bias"], tensors["m.bias"] + tensors["m.weight"] @ z)
    assert close(got["weight"], tensors["m.weight"] * z)
    assert by_module([shift, Edit(Verb.UNTIE, Site("other")), scale]) == {
        "m": [shift, scale],
        "other": [Edit(Verb.UNTIE, Site("other"))],
    }


ORDERS = st.sampled_from([1, 2, 4, 8, 12, 20, 28, 64])


@settings(max_examples=40)
@given(order=ORDERS, copies=st.integers(1, 3), seed=st.integers(0, 50))
def test_a_described_rotation_is_an_orthogonal_matrix(order: int, copies: int, seed: int) -> None:
    rotation = Hadamard(order, seed, copies)
    q = dense(rotation)
    eye = torch.eye(rotation.width, dtype=torch.float64)
    assert torch.allclose(q @ q.T, eye, atol=1e-12)
    assert torch.allclose(rotation.times_transposed(eye), q.T, atol=1e-12)
    x = torch.randn(2, 3, rotation.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(rotation.times(x), x @ q, atol=1e-12)
    assert torch.allclose(rotation.times_transposed(x), x @ q.T, atol=1e-12)
    block = q[:order, :order]
    assert torch.allclose(block.abs(), torch.full_like(block, order**-0.5), atol=1e-12)
    assert torch.allclose(q, torch.block_diag(*[block] * copies), atol=1e-12)


def test_another_seed_is_another_rotation_and_the_same_seed_the_same() -> None:
    assert torch.equal(dense(Hadamard(16, 3)), dense(Hadamard(16, 3)))
    assert not torch.equal(dense(Hadamard(16, 3)), dense(Hadamard(16, 4)))
    state = torch.random.get_rng_state()
    dense(Hadamard(8, 99))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_order_that_has_a_hadamard_matrix_has_factors() -> None:
    for order in (n for n in range(1, 1025) if has_hadamard(n)):
        left, right = factors(order)
        assert left.shape[0] * right.shape[0] == order
        assert right.shape[0] & (right.shape[0] - 1) == 0


@pytest.mark.parametrize("order", [344, 576, 960, 1536])
def test_a_rotation_by_factors_keeps_lengths(order: int) -> None:
    x = torch.randn(3, order, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = Hadamard(order, 1).times(x)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1), rtol=1e-12)
    assert torch.allclose(Hadamard(order, 1).times_transposed(y), x, atol=1e-12)


@settings(max_examples=40)
@given(seed=SEEDS, transposed=st.booleans(), order=st.sampled_from([2, 4, 8]), subset=st.booleans())
def test_rotating_rows_and_columns_is_the_dense_product(
    seed: int, transposed: bool, order: int, subset: bool
) -> None:
    out = width = 8
    copies = (4 if subset and order < 8 else 8) // order or 1
    rotation = Hadamard(order, seed % 50, copies)
    channels = tuple(
        torch.randperm(8, generator=torch.Generator().manual_seed(seed))[: rotation.width].tolist()
    )
    q = torch.eye(8, dtype=torch.float64)
    q[torch.tensor(channels)[:, None], torch.tensor(channels)] = dense(rotation)
    made = module("linear", seed=seed, out=out, width=width, transposed=transposed)
    weight = made[1]["m.weight"].T if transposed else made[1]["m.weight"]
    got = edited(made, Verb.ROTATE_OUT, rotation, channels=channels)
    assert close(got["weight"].T if transposed else got["weight"], q.T @ weight)
    assert close(got["bias"], q.T @ made[1]["m.bias"])
    got = edited(made, Verb.ROTATE_IN, rotation, channels=channels)
    assert close(got["weight"].T if transposed else got["weight"], weight @ q)
    assert torch.equal(got["bias"], made[1]["m.bias"])


def test_rotating_an_embedding_rotates_each_of_its_rows() -> None:
    made = module("embedding", seed=5, out=11)
    rotation = Hadamard(COLUMNS, 2)
    got = edited(made, Verb.ROTATE_OUT, rotation)
    assert close(got["weight"], made[1]["m.weight"] @ dense(rotation))


KRONECKER = st.builds(
    Kronecker,
    left=st.sampled_from([2, 4]),
    right=st.sampled_from([4, 8]),
    seed=st.integers(0, 50),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    copies=st.integers(1, 2),
    random=st.booleans(),
)


@settings(max_examples=40)
@given(rotation=KRONECKER, seed=SEEDS, transposed=st.booleans())
def test_an_online_rotation_by_the_stored_factors_is_folded_back_exactly(
    rotation: Kronecker, seed: int, transposed: bool
) -> None:
    width = rotation.left * rotation.right * rotation.copies
    made = module("linear", seed=seed, width=width, transposed=transposed)
    got = edited(made, Verb.WRAP, rotation)
    left, right = stored_factors(rotation)
    assert torch.equal(left, left.to(rotation.dtype).double())
    assert torch.equal(got["left_trans"], left)
    assert torch.equal(got["right_trans"], right)
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kernel = torch.block_diag(*[torch.kron(left, right)] * rotation.copies)
    assert torch.allclose(rotate(x, left, right), x @ kernel, atol=1e-12)
    weight, new = (t["weight"] if "weight" in t else t["m.weight"] for t in (made[1], got))
    weight, new = (weight.T, new.T) if transposed else (weight, new)
    assert torch.allclose(rotate(x, left, right) @ new.T, x @ weight.T, rtol=0, atol=1e-11)


def test_rounded_factors_are_not_orthogonal_which_is_why_they_are_inverted() -> None:
    left, _ = stored_factors(Kronecker(12, 8, 0, torch.bfloat16))
    error = (left @ left.T - torch.eye(12, dtype=torch.float64)).abs().max()
    assert error > 1e-4


def test_swap_and_untie_change_no_number() -> None:
    made = module("linear", seed=6)
    for verb in (Verb.SWAP, Verb.UNTIE):
        got = edited(made, verb)
        assert torch.equal(got["weight"], made[1]["m.weight"])
        assert torch.equal(got["bias"], made[1]["m.bias"])


def test_every_verb_has_a_weight_side() -> None:
    assert set(VERBS) == set(Verb)
