"""``qc plan --yaml``: any plan is a recipe file that makes the same plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qc.compiler.compile import Options, plan
from qc.compiler.plan import Plan
from qc.compiler.recipe import read_recipe
from qc.compiler.recipe_yaml import globs, recipe_yaml
from qc.compiler.scheme import matches
from tests.plans import schemes
from tests.programs import captured

PLANS = [
    ("llama-128", "iter_smooth,quarot,linear_quant", "auto"),
    (
        "llama-128",
        "quarot{online=true, max_tp_size=2, down_proj_online_layers=1, block_size=8},linear_quant",
        "w4a4",
    ),
    (
        "llama-128",
        "iter_smooth{symmetric=false},linear_quant{act_method=histogram,weight_method=ssz}",
        "w8a8-static",
    ),
    ("llama-128", "fuse_norms,rotate_heads,autoround{iters=7}", "w4a16-g64"),
    ("llama-128", "flatquant,gptq", "auto"),
    ("llama-128", "linear_quant{weight_method=clip}", "w8a8"),
    ("llama-128", "spqr", "w4a16-g64-asym"),
    (
        "llama-128",
        "awq{weight_qconfig=w4a16-g64@clip},flex_awq_ssz{qconfig=w8a8},linear_quant{include=*.o_proj}",
        "w8a8-mix",
    ),
    ("mixtral", "smooth_quant,flex_smooth_quant,linear_quant", "experts-w4a8"),
    (
        "llama",
        "kv_smooth,linear_quant{exclude=*.0.*},dynamic_cache{symmetric=false},fa3_quant{fa_k=per_token,fa_q=float}",
        "w8a8",
    ),
]


def work(found: Plan) -> list[object]:
    return [[(r.pattern, r.where, r.edits) for r in step.answer.rewrites] for step in found.steps]


@pytest.mark.parametrize(("family", "passes", "scheme"), PLANS)
def test_a_plan_is_a_recipe_that_makes_it_again(
    family: str, passes: str, scheme: str, tmp_path: Path
) -> None:
    program = captured(family)
    found = plan(program, passes, Options(scheme=scheme, target="modelslim")).require()
    (tmp_path / "plan.yaml").write_text(recipe_yaml(found), encoding="utf-8")
    again = plan(program, read_recipe(tmp_path / "plan.yaml")).require()
    assert [step.what.name for step in again.steps] == [step.what.name for step in found.steps]
    assert work(again) == work(found)
    assert schemes(again) == schemes(found)
    assert recipe_yaml(again) == recipe_yaml(found)


def test_it_is_plain_yaml_with_comments_for_what_no_recipe_says() -> None:
    found = plan(
        captured("llama-128"), "iter_smooth,linear_quant", Options(scheme="w8a8", tp=2, seed=3)
    ).require()
    text = recipe_yaml(found)
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert any("--target vllm-ascend" in line for line in comments)
    assert {"# --tp 2", "# --seed 3"} <= set(comments)
    document = yaml.safe_load(text)
    assert document["apiversion"] == "modelslim_v1"
    assert document["spec"]["process"][0]["alpha"] == 0.6
    assert "*id" not in text


@settings(max_examples=50)
@given(st.sets(st.tuples(st.integers(0, 12), st.sampled_from(["up", "down", "q"])), min_size=1))
def test_globs_choose_exactly_what_they_are_for(chosen: set[tuple[int, str]]) -> None:
    every = [f"model.layers.{layer}.mlp.{name}" for layer in range(13) for name in ("up", "down", "q")]
    names = [f"model.layers.{layer}.mlp.{name}" for layer, name in sorted(chosen)]
    found = globs(names, every)
    assert {name for name in every if matches(name, found)} == set(names)
