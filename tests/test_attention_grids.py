"""Int8 caches and attentions: where their stubs stand, what is stored, what runs, and scales of keys through rope."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks.mutant_rewrites import program_of
from qc.compiler.attention_sites import attention_sites, common_parent
from qc.compiler.capture_grids import dynamic_operands
from qc.compiler.errors import Refused
from qc.compiler.laws import is_attention
from qc.compiler.load import load
from qc.compiler.plan import make_plan
from qc.compiler.rope_pairs import carrier
from qc.compiler.targets.ascendv1 import merged
from qc.compiler.verify import verify
from qc.passes.fa3_quant import Fa3Quant, recall_window
from qc.passes.kv_smooth import KvSmooth, joined
from qc.runtime.attention_grid import channel_grid, head_grid, token_grid
from tests.homes import Home, compiled, logits, tensors_of
from tests.plans import planned
from tests.programs import captured, relative


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 50))
def test_grids_are_round_to_nearest_per_channel_head_and_token(seed: int) -> None:
    x = randn(2, 3, 5, 4, seed=seed)
    channel = x.abs().amax((0, 2)) / 127
    want = (x / channel[:, None]).round() * channel[:, None]
    torch.testing.assert_close(channel_grid(x, channel.flatten(), torch.zeros(12)), want)
    head = x.abs().amax((0, 2, 3)) / 127
    want = (x / head[:, None, None]).round() * head[:, None, None]
    torch.testing.assert_close(head_grid(x, head[:, None], torch.zeros(3, 1)), want)
    token = x.abs().amax(3, keepdim=True) / 127
    torch.testing.assert_close(token_grid(x, torch.ones(1), torch.zeros(1)), (x / token).round() * token)


def test_a_grid_that_is_not_calibrated_changes_nothing() -> None:
    x = randn(1, 3, 5, 4)
    assert torch.equal(channel_grid(x, torch.zeros(12), torch.zeros(12)), x)
    assert torch.equal(head_grid(x, torch.zeros(3, 1), torch.zeros(3, 1)), x)
    assert torch.equal(token_grid(x, torch.zeros(1), torch.zeros(1)), x)


def test_an_offset_moves_the_grid() -> None:
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    got = channel_grid(x, torch.tensor([2 / 255]), torch.tensor([-255.0]))
    torch.testing.assert_close(got.flatten(), torch.tensor([1.0, 2.0, 3.0]), atol=2 / 255, rtol=0)
    assert not torch.equal(got, x)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "qwen3", "gpt2", "mixtral", "opt"])
def test_attentions_are_found_by_dataflow(family: str) -> None:
    program = captured(family)
    sites = attention_sites(program)
    assert len(sites) == len(program.blocks)
    modules = dict(program.root.named_modules())
    for site in sites:
        assert site.module in modules
        assert all(writer.startswith(site.module) for names in site.writers for writer in names)
        assert site.heads % site.kv_heads == 0


def test_the_parent_of_linears_is_the_innermost_that_holds_all() -> None:
    assert common_parent(["a.b.c.q", "a.b.d.k"]) == "a.b"
    assert common_parent(["a.attn.qkv"]) == "a.attn"
    assert common_parent(["q", "k"]) == ""


@pytest.mark.broad
@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt2"])
def test_a_cache_is_stored_under_its_projections_and_read_back(
    family: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home(family), tmp_path / "out"
    result = compiled(place, out, "linear_quant,dynamic_cache", scheme="w8a8", target="modelslim")
    site = attention_sites(place.program)[0]
    kinds, stored = json.loads((out / "quant_model_description.json").read_text()), tensors_of(out)
    assert kinds["kv_cache_type"] == kinds["kv_quant_type"] == "C8"
    for operand, name in ((1, "k_proj"), (2, "v_proj")):
        heads, width = site.sizes(operand)
        scale = stored[f"{site.module}.{name}.kv_cache_scale"]
        assert scale.shape == (heads * width,)
        assert bool((scale > 0).all())
        assert not stored[f"{site.module}.{name}.kv_cache_offset"].any()
        assert kinds[f"{site.module}.{name}.kv_cache_scale"] == "C8"
    assert not [check for check in verify(out) if check.wrong]
    assert result.journal.passes(["dynamic_cache"]) == [
        f"dynamic_cache: {len(place.program.blocks)} rewrites"
    ]
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, out))
    compiled(place, tmp_path / "plain", "linear_quant", scheme="w8a8", target="modelslim")
    plain = logits(load(tmp_path / "plain", dtype=torch.float32))
    assert 1e-4 < relative(got, plain) < 0.1
    assert relative(got, want) < 0.2


def test_the_range_of_a_cache_is_that_of_all_calibration(home: Callable[[str], Home], tmp_path: Path) -> None:
    place = home("llama")
    compiled(place, tmp_path / "out", "dynamic_cache", target="modelslim", scheme="float")
    compiled(place, tmp_path / "few", "dynamic_cache", target="modelslim", scheme="float", samples=1)
    name = "model.layers.0.self_attn.k_proj.kv_cache_scale"
    whole, first = (tensors_of(tmp_path / folder)[name] for folder in ("out", "few"))
    assert bool((whole >= first).all())
    assert bool((whole > first).any())


@pytest.mark.broad
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_an_attention_reads_q_k_and_v_on_grids_per_head(
    family: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home(family), tmp_path / "out"
    compiled(place, out, "fa3_quant,linear_quant", scheme="w8a8", target="modelslim")
    site = attention_sites(place.program)[0]
    kinds, stored = json.loads((out / "quant_model_description.json").read_text()), tensors_of(out)
    assert kinds["fa_quant_type"] == "FAKQuant"
    assert kinds[f"{site.module}.quant_type"] == "INT8"
    for operand, name in enumerate(("fa_q", "fa_k", "fa_v")):
        scale, offset = (stored[f"{site.module}.{name}.{leaf}"] for leaf in ("scale", "offset"))
        assert scale.shape == offset.shape == (site.sizes(operand)[0], 1)
        assert (scale.dtype, offset.dtype) == (torch.float32, torch.int8)
        assert kinds[f"{site.module}.{name}.scale"] == "FAQuant"
    assert not [check for check in verify(out) if check.wrong]
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, out))
    assert 1e-4 < relative(got, want) < 0.2


def test_a_grid_per_token_stores_nothing_and_runs(home: Callable[[str], Home], tmp_path: Path) -> None:
    place, out = home("llama"), tmp_path / "out"
    compiled(
        place, out, "fa3_quant{fa_q=per_token,fa_k=per_token,fa_v=float}", scheme="float", target="modelslim"
    )
    kinds = json.loads((out / "quant_model_description.json").read_text())
    assert kinds["model.layers.0.self_attn.quant_type"] == "QK_INT8_DYNAMIC"
    assert not any("fa_" in name for name in tensors_of(out))
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, out))
    assert 1e-5 < relative(got, want) < 0.05


def test_merged_types_come_apart_again() -> None:
    assert merged(dict.fromkeys("QKV", "INT8")) == "INT8"
    mixed = merged({"Q": "INT8", "K": "INT8", "V": "INT8_DYNAMIC"})
    assert mixed == "QK_INT8_V_INT8_DYNAMIC"
    assert dynamic_operands(mixed) == [2]
    assert dynamic_operands("INT8") == []
    assert dynamic_operands("INT8_DYNAMIC") == [0, 1, 2]


def test_stubs_are_in_the_plan_and_in_the_graph() -> None:
    plan = planned("llama", "dynamic_cache,fa3_quant{fa_v=per_token}", scheme="float", target="modelslim")
    assert plan.problems == ()
    notes = [node.meta["note"] for node in plan.final.graph.nodes if "int8" in str(node.meta.get("note"))]
    blocks = len(plan.program.blocks)
    assert len(notes) == 5 * blocks
    assert {"cached k int8/channel", "attention reads v int8/token"} <= set(notes)
    assert f"{blocks} attention" in str(plan)


def test_grids_that_no_server_reads_are_refused() -> None:
    found = planned("llama", "fa3_quant", scheme="float", target="vllm-ascend").problems
    assert any("stubs stand behind it" in problem for problem in found)
    found = planned("llama", "dynamic_cache{symmetric=false}", scheme="float", target="vllm-ascend").problems
    assert any("forgets it when it reads" in problem for problem in found)
    found = planned("llama", "dynamic_cache", scheme="float", target="vllm-ascend").problems
    assert any("multiple of 32" in problem for problem in found)
    for late in ("iter_smooth{enable_subgraph_type=ov}", "rotate_heads"):
        found = planned("llama", f"dynamic_cache,{late}", scheme="float", target="modelslim").problems
        assert any("int8 grid stands between" in problem for problem in found)
    found = planned("llama", "dynamic_cache,kv_smooth", scheme="float", target="modelslim").problems
    assert any("put it before dynamic_cache" in problem for problem in found)


def test_an_attention_that_is_written_out_has_no_place_for_a_grid() -> None:
    plan = make_plan(program_of("mpt"), "dynamic_cache,fa3_quant", scheme="float", target="modelslim")
    assert len([problem for problem in plan.problems if "writes attention out" in problem]) == 2


@pytest.mark.parametrize(("option", "value"), [("fa_q", "per_row"), ("recall_v", 0.0), ("recall_qk", 1.5)])
def test_options_of_the_attention_grids(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        Fa3Quant(**{option: value})
    with pytest.raises(ValueError, match="nothing to quantize"):
        Fa3Quant(fa_q="float", fa_k="float", fa_v="float")
    with pytest.raises(ValueError, match="smooth_factor"):
        KvSmooth(smooth_factor=0.0)


def test_the_recall_window_is_the_shortest_that_holds_its_share() -> None:
    values = torch.tensor([[-9.0, 1.0, 2.0, 3.0, 4.0], [-1.0, 0.0, 1.0, 2.0, 50.0]])
    assert recall_window(values, 0.8).tolist() == [4.0, 2.0]
    assert recall_window(values, 1.0).tolist() == [9.0, 50.0]


# Scales of keys.

PAIRS = {
    "llama": ((0, 8), False),
    "cohere": ((0, 1), True),
    "gpt_neox": ((0, 2), False),
    "qwen3": ((0, 12), True),
    "phi3": ((0, 8), False),
    "gpt2": ((0,), False),
}


@pytest.mark.parametrize("family", PAIRS)
def test_rope_pairs_are_found_by_differentiation(family: str) -> None:
    program = captured(family)
    attention = next(node for node in program.graph.nodes if is_attention(node))
    for operand in (0, 1):
        found = carrier(program, attention, operand)
        assert not isinstance(found, str)
        assert (found.mixed[0], found.shared) == PAIRS[family]


@pytest.mark.broad
@pytest.mark.parametrize("family", [*PAIRS, "mixtral"])
def test_scales_move_from_keys_to_queries(family: str, home: Callable[[str], Home], tmp_path: Path) -> None:
    place, out = home(family), tmp_path / "out"
    result = compiled(place, out, "kv_smooth", scheme="float", target="modelslim", dtype="float32")
    proofs = [entry["certificate"]["math"] for entry in result.journal.entries if "certificate" in entry]
    assert len(proofs) == len(place.program.blocks)
    assert max(proofs) < 1e-12
    given, stored = tensors_of(place.path), tensors_of(out)
    assert any(not torch.equal(given[name].float(), stored[name].float()) for name in given)


def test_smoothed_keys_are_alike(home: Callable[[str], Home], tmp_path: Path) -> None:
    place = home("llama")
    for passes, out in (("dynamic_cache", "plain"), ("kv_smooth,dynamic_cache", "smooth")):
        compiled(place, tmp_path / out, passes, scheme="float", target="modelslim")
    name = "model.layers.0.self_attn.k_proj.kv_cache_scale"
    plain, smooth = (tensors_of(tmp_path / out)[name] for out in ("plain", "smooth"))
    assert float(smooth.max() / smooth.min()) < float(plain.max() / plain.min())
    pairs = smooth.view(-1, 2, 8).amax(1)  # one of each rope pair reaches the top of its grid
    torch.testing.assert_close(pairs * 127, torch.ones_like(pairs), atol=0.02, rtol=0)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=6))
def test_joined_is_the_finest_partition(groups: list[tuple[int, int]]) -> None:
    found = joined(8, groups)
    assert sorted(c for one in found for c in one) == list(range(8))
    assert all(any(set(group) <= one for one in found) for group in groups)
    reach = torch.eye(8)
    for a, b in groups:
        reach[a, b] = reach[b, a] = 1
    reach = torch.linalg.matrix_power(reach, 8) > 0
    assert {frozenset(row.nonzero().flatten().tolist()) for row in reach} == {frozenset(one) for one in found}


ATTENTION = "model.layers.0.self_attn"
BROKEN: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "v_proj.kv_cache_scale is in the description and in no file": lambda tensors: tensors.pop(
        f"{ATTENTION}.v_proj.kv_cache_scale"
    ),
    "does not fit": lambda tensors: tensors.update(
        {f"{ATTENTION}.k_proj.kv_cache_{leaf}": torch.ones(3) for leaf in ("scale", "offset")}
    ),
    "is one number": lambda tensors: tensors.update(
        {f"{ATTENTION}.k_proj.kv_cache_{leaf}": torch.ones(()) for leaf in ("scale", "offset")}
    ),
}


@pytest.mark.parametrize("told", BROKEN)
def test_a_broken_cache_is_refused(told: str, home: Callable[[str], Home], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compiled(home("llama"), out, "dynamic_cache", scheme="float", target="modelslim")
    (file,) = out.glob("*.safetensors")
    tensors = tensors_of(out)
    BROKEN[told](tensors)
    save_file(tensors, file)
    (index,) = out.glob("*.index.json")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file.name)}))
    with pytest.raises(Refused, match=told):
        load(out)


@pytest.mark.parametrize("passes", ["dynamic_cache", "fa3_quant"])
def test_a_copy_of_a_loaded_model_has_grids_of_its_own(
    passes: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    compiled(home("llama"), tmp_path / "out", passes, scheme="float", target="modelslim")
    model = load(tmp_path / "out")
    other, before = copy.deepcopy(model), logits(model)
    for name, buffer in other.named_buffers():
        if name.endswith("scale"):
            buffer.mul_(8)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(other), before)


def test_what_has_a_grid_gets_no_second_one() -> None:
    twice = planned("llama", "dynamic_cache,dynamic_cache", scheme="float", target="modelslim")
    assert any("has nothing to do" in problem for problem in twice.problems)
    rest = planned(
        "llama", "fa3_quant{include=*.0.*},fa3_quant{fa_v=float}", scheme="float", target="modelslim"
    )
    assert rest.problems == ()
    first, second = ({r.where for r in step.answer.rewrites} for step in rest.steps)
    assert first
    assert second
    assert not first & second
