"""Low-rank branches: exact as a rewrite, stored beside integers, of use where a weight has few huge directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qc.compiler.contract import Setting
from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.recipe import read_recipe
from qc.compiler.spelling import passes_of
from qc.compiler.verify import verify
from qc.compiler.view import BlockView
from qc.passes.svd_res import SvdRes
from qc.runtime.linear import IntegerLinear
from qc.runtime.low_rank import LowRankBranch, low_rank
from tests.homes import Home, compiled, logits, tensors_of
from tests.plans import planned
from tests.programs import captured, relative
from tests.recipes import HEAD, Written


@pytest.mark.broad
@pytest.mark.parametrize(
    ("family", "scheme", "quantizer"),
    [("llama", "w8a8", "linear_quant"), ("gpt2", "w4a16", "gptq"), ("qwen2", "w4a4", "autoround{iters=2}")],
)
def test_a_branch_keeps_the_function_and_loads(
    family: str, scheme: str, quantizer: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home(family), tmp_path / "out"
    result = compiled(place, out, f"svd_res{{rank=4}},{quantizer}", scheme=scheme, target="modelslim")
    assert result.journal.worst < 1e-12
    stored, types = tensors_of(out), json.loads((out / "quant_model_description.json").read_text())
    first = [name for name in stored if name.endswith(".svd_lowrank_l1")]
    assert first
    for name in first:
        prefix = name.removesuffix(".svd_lowrank_l1")
        out_features, in_features = stored[f"{prefix}.weight"].shape
        assert stored[name].shape == (4, in_features)
        assert stored[f"{prefix}.svd_lowrank_l2"].shape == (out_features, 4)
        assert types[name] == types[f"{prefix}.svd_lowrank_l2"] == "FLOAT"
        assert types[f"{prefix}.weight"] == types[f"{prefix}.weight_scale"]
        assert types[f"{prefix}.weight"].endswith("_SVD")
    assert not types["model_quant_type"].endswith("_SVD")
    assert not [str(check) for check in verify(out) if check.wrong]
    model = load(out, dtype=torch.float32)
    assert sum(isinstance(m, IntegerLinear) and m.beside == LowRankBranch(4) for m in model.modules()) == len(
        first
    )
    want, got = logits(load(place.path, dtype=torch.float32)), logits(model)
    assert 1e-4 < relative(got, want) < (0.5 if scheme != "w8a8" else 0.05)


def test_the_branch_is_the_best_of_its_rank_and_takes_outliers_off() -> None:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    weight += 40 * torch.outer(torch.ones(24), torch.eye(16)[3])
    (rewrite, *_) = (
        SvdRes(rank=2, include=("*0.self_attn.o_proj",))
        .rewrite(captured("llama"), Setting(scheme=None, roles={}, dtype=torch.bfloat16))
        .rewrites
    )
    view = BlockView("block", {f"{rewrite.where}.weight": weight}, {}, torch.bfloat16, 0)
    first, second = SvdRes(rank=2).solve(rewrite, view).values()
    left = weight - second @ first
    torch.testing.assert_close(float(left.norm()), float(torch.linalg.svdvals(weight)[2:].norm()))
    assert float(left.abs().max()) < 0.2 * float(weight.abs().max())
    x = torch.randn(5, 16)
    torch.testing.assert_close(low_rank(x, first, second) + x @ left.T, x @ weight.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("passes", "scheme", "target", "why"),
    [
        ("svd_res,linear_quant", "w8a8", "vllm-ascend", "the server has no linear with a low-rank branch"),
        ("svd_res", "float", "modelslim", "stays float"),
        (
            "svd_res,iter_smooth,linear_quant",
            "w8a8",
            "modelslim",
            "svd_res takes linear sites before iter_smooth",
        ),
        ("svd_res,svd_res,linear_quant", "w8a8", "modelslim", "a linear has one branch"),
        ("svd_res{rank=65},linear_quant", "w8a8", "modelslim", "rank=65 is more than its"),
        ("online_rotation,svd_res,linear_quant", "w4a4", "modelslim", "does not say which reads which"),
        ("svd_res,linear_quant", "w4a8", "modelslim", "the layout has none beside W4A8_DYNAMIC"),
    ],
)
def test_where_it_cannot_stand_is_a_problem(passes: str, scheme: str, target: str, why: str) -> None:
    found = planned("llama-128", passes, scheme=scheme, target=target).problems
    assert any(why in problem for problem in found), found


def test_recipes_have_it_and_options_out_of_range_are_refused(written: Written) -> None:
    recipe = read_recipe(written(HEAD + "    - {type: svd_res, rank: 8, exclude: ['*.down_proj']}"))
    assert [str(one) for one in recipe.passes] == ["svd_res{rank=8, exclude=*.down_proj}"]
    with pytest.raises(Refused, match="rank=0"):
        passes_of("svd_res{rank=0}")
