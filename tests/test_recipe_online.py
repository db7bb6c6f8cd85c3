"""The recipe's online rotations, caches and stages: what users have runs as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import Qwen3Config

from benchmarks.random_llama import character_tokenizer
from qc.compiler.capture import capture
from qc.compiler.compile import Options, compile, plan
from qc.compiler.load import load
from qc.compiler.operand import Kronecker, stored_factors
from qc.compiler.recipe import read_recipe
from qc.compiler.verify import verify
from qc.passes.dynamic_cache import DynamicCache
from qc.passes.fa3_quant import Fa3Quant
from qc.passes.quarot_online import QuarotOnline
from qc.runtime.kronecker import laos_split
from tests.families import build
from tests.homes import Home, compiled, logits, tensors_of
from tests.plans import planned
from tests.programs import captured, relative
from tests.recipes import HEAD, Written

LAOS_V1 = Path(__file__).parents[2] / "shared" / "recipes" / "laos-v1.yaml"


@pytest.mark.parametrize(
    ("width", "sizes"),
    [(6144, (64, 96)), (11008, (64, 172)), (12288, (96, 128)), (17408, (128, 136)), (25600, (160, 160)),
     (27648, (144, 192)), (28672, (128, 224))],
)  # fmt: skip
def test_widths_split_as_the_reference_tool_splits_them(width: int, sizes: tuple[int, int]) -> None:
    assert laos_split(width) == sizes


def test_a_width_without_a_split_says_so() -> None:
    with pytest.raises(ValueError, match="width 1037 is no product"):
        laos_split(1037)


@given(st.sampled_from([1, 2, 4]), st.sampled_from(["heads", "kronecker"]))
def test_factors_stay_within_the_heads_of_a_rank(block: int, layout: str) -> None:
    turned = Kronecker(8, 12, 3, torch.float64, layout=layout, block=block)  # type: ignore[arg-type]
    left, right = stored_factors(turned)
    torch.testing.assert_close(left @ left.T, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(right @ right.T, torch.eye(12, dtype=torch.float64))
    across = torch.block_diag(*[torch.ones(block, block)] * (8 // block)) == 0
    assert not left[across].any()
    assert torch.equal(right, torch.eye(12, dtype=torch.float64)) == (layout == "heads")


@pytest.mark.broad
@pytest.mark.parametrize(
    ("family", "scheme"), [("llama", "w4a4"), ("qwen3", "w8a8"), ("phi3", "w4a4"), ("mixtral", "w8a8")]
)
def test_rotations_are_stored_beside_the_linears_and_run(
    family: str, scheme: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home(family), tmp_path / "out"
    passes = "quarot{online=true, max_tp_size=2, down_proj_online_layers=0},linear_quant"
    result = compiled(place, out, passes, scheme=scheme, target="modelslim")
    assert result.journal.worst < 1e-12
    stored, kinds = tensors_of(out), json.loads((out / "quant_model_description.json").read_text())
    turned = [name for name in stored if name.rpartition(".")[2].startswith(("heads_rot", "kronecker_rot"))]
    assert len([name for name in turned if "heads_rotation" in name]) == len(place.program.blocks)
    assert not any(name in kinds for name in turned)
    assert kinds["metadata"]["quarot"]["max_tp_size"] == 2
    assert kinds["metadata"]["quarot"]["heads_rotation"]["layers"] == list(range(len(place.program.blocks)))
    assert kinds["metadata"]["quarot"]["kronecker_rotation"]["layers"][:1] == [0]
    assert not [check for check in verify(out) if check.wrong]
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, out))
    assert 1e-4 < relative(got, want) < (0.6 if scheme == "w4a4" else 0.1)


def test_a_server_that_does_not_know_them_refuses_with_what_it_serves() -> None:
    found = planned("llama-128", "quarot_online,linear_quant", scheme="w4a4", target="vllm-ascend").problems
    assert any("online rotation (heads)" in one and "take online_rotation" in one for one in found)


def test_sizes_that_do_not_fit_are_problems_and_layers_beyond_the_last_are_notes() -> None:
    found = planned("llama", "quarot_online{max_tp_size=8}", scheme="float", target="modelslim")
    assert any("max_tp_size=8 does not divide its" in problem for problem in found.problems)
    found = planned(
        "llama",
        "quarot_online{max_tp_size=2,down_proj_online_layers=0+7}",
        scheme="float",
        target="modelslim",
    )
    assert found.problems == ()
    assert any("7 is the first" in note for note in found.steps[0].answer.notes)
    late = planned(
        "llama",
        "quarot_online{max_tp_size=2},iter_smooth{enable_subgraph_type=ov}",
        scheme="float",
        target="modelslim",
    )
    assert any("after quarot_online" in problem for problem in late.problems)


def test_the_rotation_of_the_hidden_state_is_there_for_draft_models(
    home: Callable[[str], Home], tmp_path: Path
) -> None:
    place = home("llama")
    compiled(place, tmp_path / "out", "quarot", scheme="float", target="modelslim", dtype="float32")
    q = load_file(tmp_path / "out" / "optional" / "quarot.safetensors")["global_rotation"]
    width = q.shape[0]
    torch.testing.assert_close(q @ q.T, torch.eye(width), atol=1e-5, rtol=0)
    given, turned = (
        tensors_of(path)["model.embed_tokens.weight"].float() for path in (place.path, tmp_path / "out")
    )
    assert relative(turned, given @ q) < 0.01
    kinds = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert kinds["optional"]["quarot"]["rotation_map"]["global_rotation"] == "optional/quarot.safetensors"
    assert not [check for check in verify(tmp_path / "out") if check.wrong]
    compiled(place, tmp_path / "none", "quarot{export_extra_info=false}", scheme="float", target="modelslim")
    assert not (tmp_path / "none" / "optional").exists()


# Recipes.


def test_quarot_of_a_recipe_means_what_the_reference_tool_means(written: Written) -> None:
    recipe = read_recipe(
        written(HEAD + "    - {type: quarot, online: true, down_proj_online_layers: [1, 3]}")
    )
    assert recipe.passes[-1] == QuarotOnline(max_tp_size=4, down_proj_online_layers=(1, 3))
    assert "online" not in str(read_recipe(written(HEAD + "    - {type: quarot}")).passes)


def test_caches_and_attentions_of_a_recipe(written: Written) -> None:
    recipe = read_recipe(written(HEAD + """
    - type: group
      configs:
        - {type: dynamic_cache, qconfig: {dtype: int8, scope: per_channel, symmetric: false, method: minmax}}
        - {type: fa3_quant, qconfig: {dtype: int8, scope: per_token, symmetric: true, method: minmax}}
    - {type: fa3_quant, details: {fa_q: {dtype: int8, scope: per_token}, fa_v: {dtype: int8, scope: per_head}}}
    - {type: fa3_quant}
"""))  # fmt: skip
    assert recipe.passes == (
        DynamicCache(symmetric=False),
        Fa3Quant(fa_q="per_token", fa_k="per_token", fa_v="per_token"),
        Fa3Quant(fa_q="per_token", fa_k="float"),
        Fa3Quant(),
    )


def test_stages_and_runners_that_change_nothing_are_notes(written: Written) -> None:
    recipe = read_recipe(written(HEAD + """
    - {type: quarot}
  prior: [{process: [{type: iter_smooth}], dataset: other.jsonl}]
  runner: dp_layer_wise
  save: [{type: ascendv1_saver_distributed}]
"""))  # fmt: skip
    assert any("the stage of prior on line 6 (iter_smooth" in note for note in recipe.notes)
    assert any(note.startswith("runner dp_layer_wise: qc works block by block") for note in recipe.notes)
    assert recipe.target == "modelslim"


def test_what_the_server_would_not_load_stands_beside_a_recipe_that_does_not_name_it(
    written: Written,
) -> None:
    recipe = read_recipe(written(HEAD + "    - {type: fa3_quant}\n  save: [{type: ascendv1_saver}]"))
    found = plan(captured("llama"), recipe)
    assert found.problems == ()
    assert any(note.startswith("vllm-ascend would not serve this: ") for note in found.notes)
    asked = plan(captured("llama"), recipe, Options(target="vllm-ascend"))
    assert any("stubs stand behind it" in problem for problem in asked.problems)


@pytest.mark.broad
@pytest.mark.skipif(not LAOS_V1.is_file(), reason="the recipe as users have it is not here")
def test_the_recipe_that_users_have_compiles_as_it_is(home: Callable[[str], Home], tmp_path: Path) -> None:
    config = Qwen3Config(
        hidden_size=256, num_attention_heads=8, num_key_value_heads=4, head_dim=32, intermediate_size=512,
        num_hidden_layers=2, vocab_size=96, tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    build(config).save_pretrained(tmp_path / "model")
    text = LAOS_V1.read_text(encoding="utf-8")
    (tmp_path / "laos-v1.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "boolq.jsonl").write_bytes(home("llama").text.read_bytes())
    program, recipe = capture(tmp_path / "model", certify=False), read_recipe(tmp_path / "laos-v1.yaml")
    whole = plan(program, recipe)
    assert whole.problems == ()
    assert any("group of 256" in note for note in whole.notes)
    shorter = text.replace("iters: 400", "iters: 2")
    (tmp_path / "laos-v1.yaml").write_text(shorter, encoding="utf-8")
    (tmp_path / "boolq.jsonl").write_text(json.dumps({"inputs_pretokenized": home("llama").text.read_text()}))
    options = Options(samples=2, length=24, tokenizer=character_tokenizer())
    result = compile(program, read_recipe(tmp_path / "laos-v1.yaml"), tmp_path / "out", options)
    assert result.journal.worst < 1e-12
    assert not [check for check in verify(tmp_path / "out") if check.wrong]
    stored = tensors_of(tmp_path / "out")
    assert {
        "model.layers.1.mlp.down_proj.kronecker_rotation_m",
        "model.layers.0.self_attn.o_proj.heads_rotation",
    } <= stored.keys()
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].shape == (256, 2)
    load(tmp_path / "out", dtype=torch.float32)
