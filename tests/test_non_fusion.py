"""Smoothing where no writer can take a scale in: an online division, exact, stored around the linear."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qc.compiler.load import load
from qc.compiler.verify import verify
from qc.runtime.divided import DividedLinear
from tests.homes import Home, compiled, logits, tensors_of
from tests.plans import planned
from tests.programs import relative

ONLY = "enable_subgraph_type=non-fusion"


@pytest.mark.broad
@pytest.mark.parametrize(
    ("family", "smoother", "quantizer", "scheme"),
    [
        ("gpt2", f"iter_smooth{{{ONLY}}}", "linear_quant", "w8a8"),
        ("gpt_neox", f"flex_smooth_quant{{{ONLY}}}", "linear_quant", "w8a8-static"),
        ("gpt2", f"awq{{{ONLY}}}", "gptq", "w4a16"),
    ],
)
def test_it_keeps_the_function_and_loads(
    family: str, smoother: str, quantizer: str, scheme: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home(family), tmp_path / "out"
    result = compiled(place, out, f"{smoother},{quantizer}", scheme=scheme, target="modelslim")
    assert result.journal.worst < 1e-12
    stored, types = tensors_of(out), json.loads((out / "quant_model_description.json").read_text())
    divisions = [name for name in stored if name.endswith(".div.mul_scale")]
    assert len(divisions) >= len(place.program.blocks)
    for name in divisions:
        inner = name.removesuffix("div.mul_scale") + "linear"
        assert types[name] == "FLOAT"
        assert stored[f"{inner}.weight"].dtype == torch.int8
        assert types[f"{inner}.weight"] != "FLOAT"
        assert f"{name.removesuffix('.div.mul_scale')}.weight" not in stored
    assert not [str(check) for check in verify(out) if check.wrong]
    model = load(out, dtype=torch.float32)
    assert sum(isinstance(module, DividedLinear) for module in model.modules()) == len(divisions)
    want, got = logits(load(place.path, dtype=torch.float32)), logits(model)
    assert 1e-4 < relative(got, want) < (0.5 if scheme == "w4a16" else 0.1)


def test_it_is_taken_only_where_it_is_asked_for_and_nothing_absorbs() -> None:
    (step, *_) = planned("gpt2", "iter_smooth,linear_quant", scheme="w8a8", target="modelslim").steps
    taken = {rewrite.pattern for rewrite in step.answer.rewrites}
    assert "non-fusion" not in taken
    (step, *_) = planned(
        "gpt2", f"iter_smooth{{{ONLY}}},linear_quant", scheme="w8a8", target="modelslim"
    ).steps
    assert {rewrite.where.rpartition(".")[2] for rewrite in step.answer.rewrites} == {"c_proj"}
    assert all("mlp" in rewrite.where for rewrite in step.answer.rewrites)  # o is smoothed through v
    (step, *_) = planned(
        "llama", f"iter_smooth{{{ONLY}}},linear_quant", scheme="w8a8", target="modelslim"
    ).steps
    assert step.answer.rewrites == ()  # everything has a writer


@pytest.mark.parametrize(
    ("passes", "target", "why"),
    [
        (f"iter_smooth{{{ONLY}}},linear_quant", "vllm-ascend", "the server has no such op"),
        (f"iter_smooth{{{ONLY}}}", "modelslim", "only for integer linears"),
    ],
)
def test_where_it_cannot_be_stored_is_a_problem(passes: str, target: str, why: str) -> None:
    found = planned("gpt2", passes, scheme="w8a8", target=target).problems
    assert any(why in problem for problem in found), found
