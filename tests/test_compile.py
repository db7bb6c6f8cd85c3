"""The whole way: a checkpoint goes in, a checkpoint that computes the same comes out, or nothing does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.random_llama import character_tokenizer
from qc.compiler.compile import Options, Result, compile
from qc.compiler.cost import cost_of
from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.weights import Checkpoint
from qc.runtime.w4a8 import unpack_pairs
from tests.families import ALL, build
from tests.homes import SAMPLES, TEXT, Home, compiled, logits, tensors_of
from tests.programs import captured, relative
from tests.simulation import recorded, simulated

SAME = 0.02
"""Nearly always 1e-6 to 1e-4; an activation on the edge between two integers falls to either side and makes more."""
FLIPS = 0.15
"""The same as a share of what quantizing changes: of int4 activations many lie on an edge, and which way they fall
differs from processor to processor."""
ROTATED = "iter_smooth,quarot,iter_smooth,linear_quant"
ONLINE = "iter_smooth,quarot{online=true},linear_quant"


# What comes out computes what went in.

EXPORTS = [
    ("llama-128", "w8a8", "iter_smooth,linear_quant", "vllm-ascend", 0.03),
    ("llama-128", "w8a8-static", "iter_smooth,linear_quant", "vllm-ascend", 0.05),
    ("llama-128", "w8a16", "linear_quant", "vllm-ascend", 0.02),
    ("llama-128", "w8a8-mix", "linear_quant", "vllm-ascend", 0.05),
    ("llama-128", "w4a8", "linear_quant", "modelslim", 0.4),
    ("llama-128", "w8a8-asym", "linear_quant", "modelslim", 0.03),
    ("llama-128", "w4a4-g32-asym", "linear_quant", "modelslim", 0.6),
    ("llama-128", "w8a8-dynamic-tensor", "linear_quant", "modelslim", 0.1),
    ("llama-128", "w4a4", ONLINE, "vllm-ascend", 0.6),
    ("llama-128", "auto", ROTATED, "vllm-ascend", 0.5),
    ("llama-128", "float", "iter_smooth,quarot,iter_smooth", "vllm-ascend", 0.02),
    ("llama-128", "w4a16", "linear_quant", "modelslim", 0.4),
    ("llama-128", "w4a16-g64", "linear_quant", "modelslim", 0.4),
    ("llama-128", "w8a8-static", "iter_smooth{symmetric=false},linear_quant", "vllm-ascend", 0.05),
    ("llama-128", "float", "iter_smooth{symmetric=false}", "modelslim", 0.02),
    ("llama-128", "w8a8", "linear_quant,dynamic_cache", "modelslim", 0.1),
    ("llama-128", "w8a8", "linear_quant,dynamic_cache{symmetric=false}", "modelslim", 0.1),
    ("phi3", "float", "dynamic_cache", "modelslim", 0.1),
    ("llama-128", "w8a8", "fa3_quant,linear_quant", "modelslim", 0.2),
    ("qwen3", "float", "fa3_quant{fa_k=per_token}", "modelslim", 0.2),
    ("llama-128", "w4a4", "iter_smooth,quarot{online=true},autoround{iters=2}", "vllm-ascend", 0.5),
    ("llama-128", "w4a16-g64", "autoround{iters=2}", "modelslim", 0.2),
    ("qwen3", "w8a8", ROTATED, "vllm-ascend", 0.03),
    ("qwen3", "auto", "iter_smooth,linear_quant", "vllm-ascend", 0.5),
    ("qwen2", "w8a8", ROTATED, "vllm-ascend", 0.03),
    ("qwen2", "w8a8-static", "iter_smooth,linear_quant", "vllm-ascend", 0.05),
    ("qwen2", "float", "quarot,iter_smooth{symmetric=false}", "modelslim", 0.02),
    ("smollm2", "w8a8", ROTATED, "vllm-ascend", 0.03),
    ("smollm2", "w8a8", "iter_smooth,linear_quant", "vllm-ascend", 0.03),
    ("phi3", "w8a8", "iter_smooth,quarot{block_size=16},linear_quant", "vllm-ascend", 0.03),
    ("gpt2", "w8a8", "iter_smooth,linear_quant", "modelslim", 0.03),
    ("opt", "w8a8", "iter_smooth,linear_quant", "vllm-ascend", 0.03),
]


@pytest.mark.parametrize(("family", "scheme", "passes", "target", "bound"), EXPORTS)
def test_the_export_computes_what_the_model_computes(
    family: str, scheme: str, passes: str, target: str, bound: float,
    home: Callable[[str], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    place = home(family)
    rounded = recorded(monkeypatch)
    result = compiled(place, tmp_path / "out", passes, scheme=scheme, target=target)
    want = logits(load(place.path, dtype=torch.float32))
    got = logits(load(tmp_path / "out", dtype=torch.float32))
    assert relative(got, want) < bound
    same = max(SAME, FLIPS * relative(got, want))
    assert relative(got, simulated(result, rounded)) < same, "the files are not what the compile rounded"
    assert scheme == "float" or relative(got, want) > 1e-4
    on_disk_as_planned(result)


def on_disk_as_planned(result: Result) -> None:
    """Bytes and bits that the plan announced, counted in the files."""
    cost, tensors = cost_of(result.plan), tensors_of(result.path)
    assert cost.disk_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    index = json.loads((result.path / "quant_model_weights.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    bits = weights = 0
    schemes = {str(n.target): n.meta["scheme"] for n in result.plan.final.graph.nodes if "scheme" in n.meta}
    for name, scheme in schemes.items():
        prefix = result.plan.layout.prefixes[name]
        weight = tensors[f"{prefix}.weight"]
        if f"{prefix}.scale_bias" in tensors:
            weight = unpack_pairs(weight)
        scales = tensors.get(f"{prefix}.weight_scale", tensors.get(f"{prefix}.deq_scale"))
        assert weight.dtype is torch.int8
        assert scales is not None
        floats = 32 if scheme.weight.symmetric else 64  # a scale, and an offset
        bits += weight.numel() * scheme.weight.bits + floats * scales.numel()
        weights += weight.numel()
        assert scheme.weight.qmin <= int(weight.min()) <= int(weight.max()) <= scheme.weight.qmax
    if weights:
        assert cost.bits_per_weight == pytest.approx(bits / weights)


def test_ranks_quantize_their_own_channels(
    home: Callable[[str], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = recorded(monkeypatch)
    result = compiled(home("llama-128"), tmp_path / "out", ONLINE, scheme="w4a4", tp=2)
    model = load(tmp_path / "out", dtype=torch.float32)
    assert model.get_submodule("model.layers.0.mlp.down_proj").blocks == 2
    assert relative(logits(model), simulated(result, rounded)) < SAME
    on_disk_as_planned(result)


def test_a_float32_model_is_exported_in_bfloat16(home: Callable[[str], Home], tmp_path: Path) -> None:
    place, wide = home("llama-128"), tmp_path / "wide"
    load(place.path, dtype=torch.float32).save_pretrained(wide)
    program = replace(place.program, path=str(wide), source=Checkpoint(wide, place.program.root))
    result = compile(program, "quarot", tmp_path / "out", Options(scheme="float"))
    assert all(tensor.dtype is torch.bfloat16 for tensor in tensors_of(result.path).values())
    assert json.loads((result.path / "config.json").read_text())["dtype"] == "bfloat16"
    assert relative(logits(load(result.path)), logits(load(place.path))) < 0.03


def test_nothing_to_do_copies_the_weights_bit_for_bit(home: Callable[[str], Home], tmp_path: Path) -> None:
    place = home("llama-128")
    compiled(place, tmp_path / "out", "linear_quant", scheme="float")
    before, after = tensors_of(place.path), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("passes", "tied"), [("iter_smooth", True), ("quarot", False), ("fuse_norms", False)]
)
def test_tied_embeddings_stay_tied_until_one_side_changes(
    passes: str, tied: bool, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place = home("smollm2")
    compiled(place, tmp_path / "out", passes, scheme="float")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in tensors_of(tmp_path / "out")) is not tied
    want, got = (logits(load(path)) for path in (place.path, tmp_path / "out"))
    assert relative(got, want) < 0.03


def test_what_stands_beside_the_weights(home: Callable[[str], Home], tmp_path: Path) -> None:
    place = home("llama-128")
    result = compiled(place, tmp_path / "out", ONLINE, scheme="w4a4")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "run.json",
        "quant_model_description.json", "quant_model_weights.safetensors.index.json", "qc_journal.jsonl",
        "qc_plan.txt",        "qc_manifest.json",
    }  # fmt: skip
    journal = [json.loads(line) for line in (tmp_path / "out" / "qc_journal.jsonl").read_text().splitlines()]
    proofs = [entry for entry in journal if "certificate" in entry]
    assert len(proofs) == result.journal.proofs
    assert all(0 <= entry["certificate"]["math"] < 1e-12 for entry in proofs)
    where = {(entry["part"], entry["pass"]) for entry in proofs}
    assert where >= {
        ("prologue", "rotate_residual"),
        ("epilogue", "rotate_residual"),
        ("model.layers.2", "fuse_norms"),
    }
    noise = [entry["sqnr_db"] for entry in journal if "sqnr_db" in entry]
    assert sum(map(len, noise)) == 21
    assert all(5 < value < 60 for part in noise for value in part.values())
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["seconds"] > 0
    assert run["peak_memory_bytes"] > 1e8
    manifest = json.loads((tmp_path / "out" / "qc_manifest.json").read_text())
    assert hashlib.sha256(place.text.read_bytes()).hexdigest() in json.dumps(manifest)


def test_the_manifest_tells_inputs_apart_and_nothing_of_where_they_are(
    home: Callable[[str], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = home("llama-128")
    digests = []
    for folder, name in (("a", "config.json"), ("b", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps([f"{folder} {TEXT * 9}"]))
        digests.append(hashlib.sha256((tmp_path / folder / name).read_bytes()).hexdigest())
    manifests = []
    for cwd, calib in (
        (tmp_path, "a/config.json b/config.json"),
        (tmp_path / "a", "config.json ../b/config.json"),
    ):
        monkeypatch.chdir(cwd)
        options = Options(scheme="w8a8", calib=calib.split(), tokenizer=character_tokenizer(), **SAMPLES)
        compile(place.program, "iter_smooth,linear_quant", f"out-{cwd.name}", options)
        manifests.append((cwd / f"out-{cwd.name}" / "qc_manifest.json").read_bytes())
    assert manifests[0] == manifests[1]
    inputs = json.loads(manifests[0])["inputs"]
    assert [inputs[f"calib/{n}/config.json"]["sha256"] for n in (1, 2)] == digests
    assert {"model/config.json", "model/model.safetensors"} <= inputs.keys()
    assert str(tmp_path).encode() not in manifests[0]


@pytest.mark.parametrize("passes", [ONLINE, "iter_smooth,quarot,autoround{iters=2}"])
def test_two_runs_write_the_same_bytes(passes: str, home: Callable[[str], Home], tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    for name in ("one", "two"):
        compiled(home("llama-128"), tmp_path / name, passes, scheme="w4a4")
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state was touched"
    one, two = (
        {f.name: f.read_bytes() for f in (tmp_path / n).rglob("*") if f.is_file()} for n in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] in ([], ["run.json"])


def test_another_seed_is_another_rotation_of_the_same_function(
    home: Callable[[str], Home], tmp_path: Path
) -> None:
    place = home("llama-128")
    found = []
    for seed in (0, 1):
        compiled(place, tmp_path / str(seed), "quarot", scheme="float", seed=seed)
        found.append(tensors_of(tmp_path / str(seed))["model.embed_tokens.weight"])
    assert not torch.equal(*found)
    assert relative(logits(load(tmp_path / "0")), logits(load(tmp_path / "1"))) < 0.03


def test_a_model_in_memory_is_compiled_with_the_tokenizer_that_is_given(tmp_path: Path) -> None:
    program = captured("llama")
    options = Options(scheme="w8a8", **SAMPLES)
    with pytest.raises(Refused, match="no tokenizer"):
        compile(program, "iter_smooth,linear_quant", tmp_path / "out", options)
    spelled = dataclasses.replace(
        options, tokenizer=lambda text, **_: {"input_ids": [ord(c) % 90 for c in text]}
    )
    compile(program, "iter_smooth,linear_quant", tmp_path / "out", spelled)
    model = build(ALL["llama"]()).float()
    assert relative(logits(load(tmp_path / "out", dtype=torch.float32)), logits(model)) < 0.1


def test_a_part_quantized_first_does_not_disturb_what_follows(
    home: Callable[[str], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EXACT pass between two quantizers: later blocks must still see the float model."""
    rounded = recorded(monkeypatch)
    passes = (
        "linear_quant{include=*.up_proj+*.gate_proj},online_rotation{enable_subgraph_type=ov},linear_quant"
    )
    result = compiled(home("llama-128"), tmp_path / "out", passes, scheme="w4a4")
    got = logits(load(tmp_path / "out", dtype=torch.float32))
    assert relative(got, simulated(result, rounded)) < SAME
