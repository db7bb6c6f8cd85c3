"""Layers that share weights (Zamba): rewritten alike or not at all, so that a server that shares them still can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import qc
from benchmarks.random_llama import character_tokenizer
from benchmarks.reach_configs import small_config
from qc.compiler.program import Program
from qc.compiler.sharing import partners
from tests.homes import tensors_of

pytestmark = pytest.mark.broad

SHARED = ("model.layers.2.shared_transf", "model.layers.5.shared_transf")


@pytest.fixture(scope="module")
def zamba(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Program]:
    path = tmp_path_factory.mktemp("zamba")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config("zamba")).eval()
    model.save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return model, qc.capture(path, certify=False)


def test_modules_with_one_weight_are_partners(zamba: tuple[torch.nn.Module, Program]) -> None:
    found = partners(zamba[1])
    assert found[f"{SHARED[0]}.self_attn.q_proj"] == {f"{SHARED[1]}.self_attn.q_proj"}
    assert not any("embed" in name or "lm_head" in name for name in found)


@pytest.mark.parametrize(
    ("passes", "alike"),
    [
        ("linear_quant", lambda done: "linear_quant" in done),  # the same integers for the same weights
        ("iter_smooth,linear_quant", lambda done: "iter_smooth" not in done),
        ("iter_smooth,autoround{iters=1}", lambda done: "iter_smooth" not in done),
    ],
)
def test_shared_layers_stay_shared(
    zamba: tuple[torch.nn.Module, Program], passes: str, alike: Callable[[set[str]], bool], tmp_path: Path
) -> None:
    model, program = zamba
    result = qc.compile(
        program, passes, out=tmp_path / "out", scheme="w8a8", target="modelslim", samples=2, length=24,
        tokenizer=character_tokenizer(),
    )  # fmt: skip
    edited = {
        rewrite.pass_name
        for step in result.plan.steps
        for rewrite in step.answer.rewrites
        if any(module.startswith(SHARED) for module in rewrite.modules)
    }
    assert alike(edited)
    stored = tensors_of(tmp_path / "out")
    for name, tensor in stored.items():
        if name.startswith(SHARED[1]) and (first := name.replace(SHARED[1], SHARED[0])) in stored:
            assert torch.equal(tensor, stored[first]), name
    assert not any(check.wrong for check in qc.verify(tmp_path / "out"))
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits.float()
        got = qc.load(tmp_path / "out", dtype=torch.float32)(input_ids=ids, use_cache=False).logits
    assert (got - want).norm() < 0.1 * want.norm()


def test_the_plan_says_what_is_left_alone(zamba: tuple[torch.nn.Module, Program]) -> None:
    plan = qc.plan(zamba[1], "iter_smooth,linear_quant", scheme="w8a8", target="modelslim")
    assert "other layers hold the same weights" in str(plan)
