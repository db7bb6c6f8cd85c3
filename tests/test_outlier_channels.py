"""Outlier channels in float: exact as a rewrite, of use where a channel is huge, stored and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qc.compiler.contract import Setting
from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.operand import Statistic
from qc.compiler.roles import read_together
from qc.compiler.spelling import passes_of
from qc.compiler.verify import verify
from qc.compiler.view import BlockView
from qc.passes.outlier_channels import OutlierChannels
from qc.runtime.linear import IntegerLinear
from qc.runtime.outlier_channels import OutlierChannels as Beside
from qc.runtime.quantize import quantize, scale_for
from qc.runtime.quantized import QuantizedLinear
from qc.runtime.w8a8 import W8A8Dynamic
from tests.homes import Home, compiled, logits, tensors_of
from tests.plans import planned
from tests.programs import captured, relative


@pytest.mark.broad
@pytest.mark.parametrize(
    ("family", "scheme", "quantizer"),
    [("llama", "w8a8", "linear_quant"), ("gpt2", "w8a8-static", "linear_quant"), ("qwen2", "w4a4", "gptq")],
)
def test_channels_keep_the_function_and_load(
    family: str, scheme: str, quantizer: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home(family), tmp_path / "out"
    passes = f"outlier_channels{{threshold=1.5,share=0.1}},{quantizer}"
    result = compiled(place, out, passes, scheme=scheme, target="modelslim")
    assert result.journal.worst < 1e-12
    found = [entry["measures"] for entry in result.journal.entries if entry.get("pass") == "outlier_channels"]
    assert any(one["outlier channels"] > one["in float"] > 0 for one in found)
    stored, types = tensors_of(out), json.loads((out / "quant_model_description.json").read_text())
    indices = [name for name in stored if name.endswith(".outlier_index")]
    assert len(indices) == len(found)
    for name in indices:
        prefix, used = name.removesuffix(".outlier_index"), stored[name][stored[name] >= 0].long()
        assert types[name] == types[f"{prefix}.outlier_weight"] == "FLOAT"
        assert types[f"{prefix}.weight"].endswith("_OUTLIERS")
        assert not stored[f"{prefix}.weight"][:, used].any()
        assert stored[f"{prefix}.outlier_weight"][:, : len(used)].any() == bool(len(used))
    assert not types["model_quant_type"].endswith("_OUTLIERS")
    assert not [str(check) for check in verify(out) if check.wrong]
    model = load(out, dtype=torch.float32)
    modules = [m for m in model.modules() if isinstance(m, IntegerLinear)]
    assert all(isinstance(m.beside, Beside) for m in modules)
    assert 1e-4 < relative(logits(model), logits(load(place.path, dtype=torch.float32))) < 0.5


def test_a_huge_channel_no_longer_costs_the_others_their_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 32, generator=generator), torch.randn(16, 32, generator=generator)
    x[:, 5] *= 300
    index = torch.tensor([5, -1], dtype=torch.int32)
    kept = weight.clone()
    kept[:, 5] = 0
    columns = torch.stack([weight[:, 5], torch.zeros(16)], 1)
    beside = {"outlier_index": index, "outlier_weight": columns}
    errors = []
    for w, float_part in ((weight, {}), (kept, beside)):
        scale = scale_for(w.abs().amax(1, keepdim=True), 8)
        q = QuantizedLinear(quantize(w, scale, 8), scale, beside=float_part)
        module = W8A8Dynamic(32, 16, dtype=torch.float32, beside=Beside(2) if float_part else None)
        module.load_state_dict(W8A8Dynamic.pack(q, torch.float32))
        errors.append(float((module(x) - x @ weight.T).norm()))
    assert errors[1] < 0.02 * errors[0]


def test_the_largest_are_taken_and_linears_that_read_one_value_take_the_same() -> None:
    program = captured("llama")
    what = OutlierChannels(threshold=2.0, share=0.05)
    rewrites = what.rewrite(program, Setting(scheme=None, roles={}, dtype=torch.bfloat16)).rewrites
    slots = {rewrite.where: rewrite.slots for rewrite in rewrites}
    for group in read_together(program).values():
        assert len({slots[name] for name in group if name in slots}) <= 1
    (slot,) = rewrites[0].slots
    (need,) = slot.needs
    assert need == Statistic("absmax", rewrites[0].where)
    for largest, want in ((torch.arange(64.0), [61, 62, 63]), (torch.arange(64.0) / 31.25, [63, -1, -1])):
        view = BlockView("block", {}, {need: largest}, torch.bfloat16, 0)
        assert what.solve(rewrites[0], view)[slot].tolist() == want


@pytest.mark.parametrize(
    ("passes", "scheme", "target", "why"),
    [
        ("outlier_channels,linear_quant", "w8a8", "vllm-ascend", "the server has no linear with outlier channels"),
        ("outlier_channels", "float", "modelslim", "stays float"),
        ("outlier_channels,svd_res{rank=4},linear_quant", "w8a8", "modelslim", "a linear has one branch"),
        ("svd_res{rank=4},outlier_channels,linear_quant", "w8a8", "modelslim", "a linear has one branch"),
        ("outlier_channels,iter_smooth,linear_quant", "w8a8", "modelslim", "before iter_smooth"),
        ("online_rotation,outlier_channels,linear_quant", "w4a4", "modelslim", "does not say which reads which"),
        ("outlier_channels,linear_quant", "w4a8", "modelslim", "the layout has none beside W4A8_DYNAMIC"),
    ],
)  # fmt: skip
def test_where_they_cannot_stand_is_a_problem(passes: str, scheme: str, target: str, why: str) -> None:
    found = planned("llama-128", passes, scheme=scheme, target=target).problems
    assert any(why in problem for problem in found), found


@pytest.mark.parametrize("options", ["threshold=0", "share=0", "share=0.6"])
def test_options_out_of_range_are_refused(options: str) -> None:
    with pytest.raises(Refused, match=options.partition("=")[0]):
        passes_of(f"outlier_channels{{{options}}}")


def test_an_index_that_cannot_be_is_told() -> None:
    beside = Beside(3)
    for index, why in (
        ([0, 7, -1], ""),
        ([0, 8, -1], "0 to 7"),
        ([2, 2, -1], "twice"),
        ([-2, 1, 3], "0 to 7"),
    ):
        assert why in beside.wrong("outlier_index", torch.tensor(index), 8)
        assert bool(why) == bool(beside.wrong("outlier_index", torch.tensor(index), 8))
