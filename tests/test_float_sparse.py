"""Sparse float weights: as many zeros as asked for, less error than dropping the smallest, stored by their own type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.recipe import read_recipe
from qc.compiler.spelling import passes_of
from qc.compiler.verify import verify
from qc.passes.admm import admm_prune, largest_by_effect, short_mantissa
from tests.homes import Home, compiled, logits, tensors_of
from tests.plans import planned
from tests.programs import relative
from tests.recipes import HEAD, Written


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    x = (randn(512, 48) @ randn(48, 48, seed=1)) * torch.linspace(0.2, 3, 48)
    return randn(16, 48, seed=2), x


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6])
def test_the_share_that_was_asked_for_is_zero_and_the_rest_makes_up_for_it(ratio: float) -> None:
    weight, x = problem()
    hessian = x.T @ x / len(x)
    sparse = admm_prune(weight, hessian, ratio)
    assert ((sparse == 0).sum(1) == round(48 * ratio)).all()
    if not ratio:
        assert relative(sparse, weight) < 0.02
        return
    size = (weight * hessian.diagonal().sqrt()).abs()
    dropped = weight * (size > size.kthvalue(round(48 * ratio), dim=1, keepdim=True).values)
    errors = [float((x @ (one - weight).T).square().mean()) for one in (sparse, dropped)]
    assert errors[0] < 0.6 * errors[1]


def test_channels_that_are_never_active_do_no_harm() -> None:
    weight, x = problem()
    x[:, ::3] = 0
    sparse = admm_prune(weight, x.T @ x / len(x), 0.3)
    assert bool(sparse.isfinite().all())
    assert bool(admm_prune(weight, torch.zeros(48, 48), 0.3).isfinite().all())


def test_mantissas_are_short_but_for_what_matters_most() -> None:
    weight, x = problem()
    protected = largest_by_effect(weight, x.T @ x / len(x))
    assert (protected.sum(1) == 1).all()
    short = short_mantissa(weight, protected)
    assert torch.equal(short[protected], weight[protected])
    mantissa, _ = torch.frexp(short[~protected])
    assert torch.equal(mantissa * 8, (mantissa * 8).round())
    assert float((short - weight).abs().div(weight.abs()).max()) <= 1 / 8 + 1e-6
    assert torch.equal(short_mantissa(torch.zeros(2, 48), protected[:2]), torch.zeros(2, 48))


@pytest.mark.broad
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_what_is_pruned_loads_and_says_what_it_is(
    family: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home(family), tmp_path / "out"
    result = compiled(
        place, out, "float_sparse{sparse_ratio=0.25}", scheme="float", target="modelslim", dtype="float32"
    )
    errors = [entry["measures"]["relative error"] for entry in result.journal.entries if "measures" in entry]
    assert errors
    assert all(0 < error < 0.5 for error in errors)
    types = json.loads((out / "quant_model_description.json").read_text())
    pruned = {name for name, kind in types.items() if kind == "W16A16S" and name.endswith(".weight")}
    assert types["model_quant_type"] == "W16A16S"
    stored = tensors_of(out)
    width = -2 if family == "gpt2" else -1
    for name in pruned:
        zeros = (stored[name] == 0).float().mean(width)
        torch.testing.assert_close(zeros, torch.full_like(zeros, 0.25), atol=0.02, rtol=0)
    assert not [str(check) for check in verify(out) if check.wrong]
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, out))
    assert 1e-3 < relative(got, want) < 0.7


@pytest.mark.broad
def test_a_quantizer_takes_what_was_pruned(home: Callable[[str], Home], tmp_path: Path) -> None:
    compiled(home("llama"), tmp_path / "out", "float_sparse,linear_quant", scheme="w8a8")
    weights = [tensor for name, tensor in tensors_of(tmp_path / "out").items() if tensor.dtype == torch.int8]
    assert weights
    assert all(float((weight == 0).float().mean()) > 0.29 for weight in weights)


def test_a_server_that_does_not_know_the_type_refuses() -> None:
    found = planned("llama", "float_sparse", scheme="float", target="vllm-ascend").problems
    assert any("does not know the type W16A16S" in problem for problem in found)
    assert planned("llama", "float_sparse,linear_quant", scheme="w8a8", target="vllm-ascend").problems == ()


def test_recipes_have_it_and_options_out_of_range_are_refused(written: Written) -> None:
    recipe = read_recipe(written(HEAD + "    - {type: float_sparse, sparse_ratio: 0.4}"))
    assert [str(one) for one in recipe.passes] == ["float_sparse{sparse_ratio=0.4}"]
    for text in ("1", "-0.1"):
        with pytest.raises(Refused, match="sparse_ratio"):
            passes_of(f"float_sparse{{sparse_ratio={text}}}")
