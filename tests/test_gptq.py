"""The pass gptq: what it rounds loads, beats rounding to nearest, and says what is wrong with its inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qc.compiler.errors import Failed, Refused
from qc.compiler.load import load
from qc.compiler.operand import Quantize, Slot
from qc.compiler.recipe import read_recipe
from qc.compiler.scheme import W4A16, W8A8
from qc.compiler.spelling import passes_of
from qc.compiler.view import BlockView
from qc.compiler.walk import Walk
from qc.passes.block_rounding import BlockRounding, Start
from qc.passes.column_rounding import gptq, inverse_factor
from qc.runtime.quantize import dequantize, scale_for
from tests.homes import Home, compiled, logits, tensors_of
from tests.programs import one_linear, relative
from tests.recipes import HEAD, Written


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view_of(x: torch.Tensor, weight: torch.Tensor) -> BlockView:
    """A block that is one linear, whose only microbatch is ``x`` [batch, seq, in]."""
    view = BlockView("block", {"w.weight": weight}, {}, torch.float32, 0)
    view.batches = 1
    view.forward = lambda hook, index: hook("w", x, weight, None)
    view.walk = lambda: one_linear(x)
    view.target = lambda index: x @ weight.T
    return view


def correlated(width: int = 32) -> torch.Tensor:
    return (randn(4, 32, width) @ randn(width, width, seed=1)) * torch.linspace(0.2, 3, width)


def rounded(x: torch.Tensor, weight: torch.Tensor, scheme: object = W4A16, **start: object) -> torch.Tensor:
    swaps = {"w": Quantize(scheme, Slot("w/integers", tuple(weight.shape)))}  # type: ignore[arg-type]
    q = BlockRounding(swaps, view_of(x, weight), "block", Start(8, **start)).solve()["w"]  # type: ignore[arg-type]
    return dequantize(q.weight, q.scale)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", [W4A16, W8A8])
def test_it_beats_rounding_to_nearest(scheme: object, act_order: bool, weighted: bool) -> None:
    x, weight = correlated(), randn(24, 32, seed=2)
    got = rounded(x, weight, scheme, act_order=act_order, weighted=weighted)
    bits = scheme.weight.bits  # type: ignore[attr-defined]
    scale = scale_for(weight.abs().amax(1, keepdim=True), bits)
    nearest = (weight / scale).round() * scale
    errors = [float((x @ (one - weight).T).square().mean()) for one in (got, nearest)]
    assert errors[0] < (0.6 if act_order else 0.8) * errors[1]


def test_a_hessian_without_factors_gets_more_damping() -> None:
    direction = randn(64)
    singular = torch.outer(direction, direction).double() * 1e12
    singular -= 1e-4 * singular.diagonal().mean() * torch.eye(64)  # rounding can leave it indefinite
    factor = inverse_factor(singular, 1e-5)
    assert bool(factor.isfinite().all())
    assert torch.equal(factor, factor.triu())
    with pytest.raises(ValueError, match="can not be factored"):
        inverse_factor(-torch.eye(4).double() * torch.arange(1, 5), 0.01)


def test_inputs_that_are_not_finite_stop_it_with_the_linear() -> None:
    x, weight = correlated(), randn(24, 32, seed=2)
    x[0, 3, 5] = torch.nan
    with pytest.raises(Failed, match=r"w in block: its inputs are not finite.*exclude it"):
        rounded(x, weight, weighted=False)
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, torch.ones(24, 1), torch.full((32, 32), torch.inf), 4)


def test_a_channel_that_is_never_active_is_rounded_to_nearest() -> None:
    x, weight = correlated(), randn(24, 32, seed=2)
    x[..., 7] = 0
    rows, scale = x.flatten(0, 1), scale_for(weight.abs().amax(1, keepdim=True), 4)
    integers, _ = gptq(weight, scale, rows.T @ rows, 4)
    assert torch.equal(integers[:, 7], (weight / scale).round()[:, 7])


def test_what_a_walk_hands_on_is_what_the_quantized_block_computes(
    home: Callable[[str], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(home("llama"), tmp_path / "walked", "gptq", scheme="w8a8", target="modelslim")
    monkeypatch.setattr(Walk, "finish", lambda *given: None)  # then every block is run once more
    compiled(home("llama"), tmp_path / "run", "gptq", scheme="w8a8", target="modelslim")
    walked, again = (tensors_of(tmp_path / place) for place in ("walked", "run"))
    assert walked.keys() == again.keys()
    assert all(torch.equal(walked[name], again[name]) for name in walked)


@pytest.mark.broad
@pytest.mark.parametrize(("family", "scheme"), [("llama", "w8a8"), ("mixtral", "w4a16"), ("gpt2", "w4a16")])
def test_what_it_rounds_loads(family: str, scheme: str, home: Callable[[str], Home], tmp_path: Path) -> None:
    place, errors = home(family), []
    for passes in ("gptq", "linear_quant"):
        compiled(place, tmp_path / passes, passes, scheme=scheme, target="modelslim")
        want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, tmp_path / passes))
        errors.append(relative(got, want))
    assert errors[0] < errors[1]


def test_a_recipe_that_asks_for_the_method_gets_the_pass(written: Written) -> None:
    weight = "{scope: per_group, dtype: int8, symmetric: true, method: gptq, ext: {percdamp: 0.05, block_size: 64}}"
    recipe = read_recipe(written(HEAD + f"    - {{type: linear_quant, qconfig: {{weight: {weight}}}}}"))
    assert [str(one) for one in recipe.passes] == ["gptq{percdamp=0.05, strategies=w8a16-g128}"]
    assert any("block_size" in note for note in recipe.notes)
    for wrong, why in (("percdamp: 0.05", "percdamp: big"), ("percdamp: 0.05", "percdmap: 0.05")):
        text = HEAD + f"    - {{type: linear_quant, qconfig: {{weight: {weight.replace(wrong, why)}}}}}"
        with pytest.raises(Refused, match="percdamp"):
            read_recipe(written(text))


@pytest.mark.parametrize("options", ["percdamp=0", "percdamp=2", "strategies=w4a4@ssz"])
def test_options_out_of_range_are_refused(options: str) -> None:
    with pytest.raises(Refused, match=options.partition("=")[0]):
        passes_of(f"gptq{{{options}}}")
