"""Rotations that keep the all-ones vector, and norms whose gain and bias move out of their way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qc.compiler.edit import Edit, Verb, apply
from qc.compiler.errors import Failed
from qc.compiler.operand import Gain, Hadamard, NormBias
from qc.compiler.pattern import Site
from tests.plans import planned
from tests.programs import captured


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 4, 8, 12, 20, 28, 64, 96]), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_it_is_orthogonal_and_keeps_the_all_ones_vector(order: int, copies: int, seed: int) -> None:
    rotation = Hadamard(order, seed, copies, keeps_ones=True)
    one = torch.eye(order * copies, dtype=torch.float64)
    q = rotation.times(one)
    assert torch.allclose(q @ q.T, one, atol=1e-12)
    assert torch.allclose(q.sum(0), torch.ones(order * copies, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(rotation.times_transposed(one), q.T, atol=1e-12)


@pytest.mark.parametrize("order", [64, 576])
def test_it_is_spread_and_not_symmetric(order: int) -> None:
    q = Hadamard(order, 3, keeps_ones=True).times(torch.eye(order, dtype=torch.float64))
    assert float(q.abs().max()) < 5 * order**-0.5
    assert float((q - q.T).norm()) > 1
    plain = Hadamard(order, 3).times(torch.eye(order, dtype=torch.float64))
    assert float((plain.sum(1) - 1).abs().max()) > 0.1


def verbs(family: str, norm: str) -> dict[str, list[Verb]]:
    step = planned(family, "quarot,linear_quant", scheme="w8a8", target="modelslim").steps[0]
    (rewrite,) = [rewrite for rewrite in step.answer.rewrites if rewrite.where == norm]
    found: dict[str, list[Verb]] = {}
    for edit in rewrite.edits:
        found.setdefault(edit.site.module, []).append(edit.verb)
    return found


def test_a_bias_goes_into_readers_that_have_one() -> None:
    found = verbs("gpt_neox", "gpt_neox.layers.0.input_layernorm")
    assert found.pop("gpt_neox.layers.0.input_layernorm") == [Verb.SHIFT_OUT, Verb.SET_UNIT]
    assert list(found.values()) == [[Verb.SHIFT_IN, Verb.SCALE_IN]]


def test_a_bias_stays_in_the_norm_where_a_reader_has_none() -> None:
    found = verbs("gpt_neox", "gpt_neox.final_layer_norm")
    assert found.pop("gpt_neox.final_layer_norm") == [Verb.SCALE_OUT, Verb.SET_UNIT]
    assert list(found.values()) == [[Verb.SCALE_IN]]


def test_a_gain_of_zero_before_a_bias_stops_with_the_reason() -> None:
    program, norm = captured("gpt_neox"), "gpt_neox.final_layer_norm"
    tensors = {f"{norm}.weight": torch.ones(64), f"{norm}.bias": torch.ones(64)}
    edit = Edit(Verb.SCALE_OUT, Site(norm), Gain(norm, 0.0, inverse=True))
    assert torch.equal(apply(program, norm, [edit], {}, tensors.get, torch.float64)["bias"], torch.ones(64))
    tensors[f"{norm}.weight"][3] = 0
    with pytest.raises(Failed, match="gain of zero in 1 channels"):
        apply(program, norm, [edit], {}, tensors.get, torch.float64)
    shift = Edit(Verb.SHIFT_OUT, Site(norm), NormBias(norm))
    assert not apply(program, norm, [shift], {}, tensors.get, torch.float64)["bias"].any()
