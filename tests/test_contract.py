"""A checkpoint written through the layout loads in the server's own classes, where they are at hand.

The server's side is ``tests/contract.py``; where it cannot be had, its tests are skipped and say why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import DENSE, build
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from qc.compiler.export import Output, check_written, exported_config, write_json
from qc.compiler.safetensors_io import ShardWriter, TensorSpec
from qc.compiler.scheme import FLOAT, W4A4, W8A8, W8A8_MIX, W8A8_STATIC, W8A16, LinearScheme
from qc.compiler.targets.served import LinearSite, ModelFacts, NormBias
from qc.compiler.targets.vllm_ascend import VLLM_ASCEND
from qc.compiler.weights import Checkpoint
from qc.runtime.hadamard import random_hadamard
from qc.runtime.kronecker import fold, split
from qc.runtime.quantize import quantize, round_scale, scale_for
from qc.runtime.quantized import QuantizedLinear
from tests.contract import judge


def sites_of(
    model: nn.Module, schemes: Mapping[str, LinearScheme], rotated: tuple[str, ...]
) -> list[LinearSite]:
    """The linears of a Llama-like model; the first scheme and every rotation whose key is in the name."""
    sites: list[LinearSite] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        turned = any(part in name for part in rotated)
        site = LinearSite(
            name,
            module.in_features,
            module.out_features,
            next((scheme for part, scheme in schemes.items() if part in name), FLOAT),
            bias=module.bias is not None,
            rotated=turned,
            split=split(module.in_features) if turned else None,
            row_parallel=name.endswith(("o_proj", "down_proj")),
        )
        sites.append(site)
    return sites


def quantized(site: LinearSite, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a linear, rounded to nearest."""
    chosen = VLLM_ASCEND.format_of(site.scheme, site.rotated)
    assert chosen is not None
    weight, left, right = weight.float(), None, None
    if site.split:
        left, right = (random_hadamard(n, 0).to(dtype) for n in site.split)
        weight = fold(weight, left, right)
    limit = weight.abs().amax(1, keepdim=True)
    scale = round_scale(scale_for(limit, chosen.weight_bits), chosen.scale_dtype(dtype))
    q = QuantizedLinear(quantize(weight, scale, chosen.weight_bits), scale, bias, left=left, right=right)
    if chosen.act_scope in ("tensor", "mix"):
        q = replace(q, input_scale=torch.tensor([0.03125]), input_offset=torch.tensor([-3.0]))
    return chosen.pack(q, dtype)


def export(
    config: PretrainedConfig,
    tmp_path: Path,
    schemes: Mapping[str, LinearScheme],
    *,
    dtype: torch.dtype = torch.bfloat16,
    rotated: tuple[str, ...] = (),
    untie: bool = False,
    norm_bias: bool = False,
) -> Path:
    """Write a random model, quantize it by the layout alone, and return the finished directory."""
    build(config).save_pretrained(tmp_path / "model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    source = Checkpoint(tmp_path / "model", model)
    sites = {site.name: site for site in sites_of(model, schemes, rotated)}
    norms = [name for name, _ in model.named_modules() if name.endswith("norm")] if norm_bias else []
    facts = ModelFacts(dtype, norm_biases=tuple(NormBias(name, "test") for name in norms))
    assert [p for p in VLLM_ASCEND.check(list(sites.values()), facts) if p.severity == "error"] == []
    names = [name for name in source.names() if untie or name not in source.ties]
    specs = {name: TensorSpec(dtype, source.shape(name)) for name in names}
    specs |= {f"{norm}.bias": TensorSpec(dtype, source.shape(f"{norm}.weight")) for norm in norms}
    layout = VLLM_ASCEND.layout(specs, list(sites.values()), facts, source)
    with Output(tmp_path / "out") as output:
        with ShardWriter(output.path, layout.specs, part_file_size=2e-5) as writer:
            for name in specs:
                module, _, leaf = name.rpartition(".")
                tensor = source.load([name])[name] if name in names else torch.ones(specs[name].shape)
                if module not in layout.prefixes:
                    for disk, piece in source.to_disk({name: tensor}).items():
                        writer.write(disk, piece.to(dtype))
                elif leaf == "weight":
                    bias = source.load([f"{module}.bias"])[f"{module}.bias"] if sites[module].bias else None
                    for part, stored in quantized(sites[module], tensor, bias, dtype).items():
                        writer.write(f"{layout.prefixes[module]}.{part}", stored)
        check_written(output.path, layout.specs)
        tied = False if untie else None
        write_json(output.path / "config.json", exported_config(source.config, dtype, tied))
        for file, value in VLLM_ASCEND.files(layout).items():
            write_json(output.path / file, value, indent=4)
    return tmp_path / "out"


MIXED = {"gate_proj": W4A4, "up_proj": W4A4, "": W8A8}
DEEP = {"layers.0.": W8A8, "layers.1.": W8A8_STATIC, "layers.2.": W4A4}
ONLINE = ("layers.2.self_attn.o_proj", "layers.2.mlp.down_proj")
CASES = {
    "one type per layer": ("qwen3", DEEP, {"norm_bias": True}),
    "int4 rotated": ("llama", DEEP, {"rotated": ONLINE}),
    "biases in float16": ("qwen2", DEEP | {"layers.0.": W8A16}, {"dtype": torch.float16}),
    "auto, untied": ("smollm2", MIXED, {"untie": True}),
    "both phases": ("qwen3", {"": W8A8_MIX}, {}),
    "weights only, tied": ("smollm2", {"": W8A16}, {}),
    "float": ("mistral", {}, {}),
}


def spoil(out: Path) -> None:
    """One shard of a fused linear gets another type."""
    path = out / "quant_model_description.json"
    description = json.loads(path.read_text())
    description["model.layers.0.self_attn.k_proj.weight"] = "W8A8"
    path.write_text(json.dumps(description))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], list[str]]]:
    """What the server's classes say of every case, and of one that is spoiled."""
    outs: dict[str, Path] = {}
    for case, (family, schemes, options) in {**CASES, "spoiled": ("qwen3", {"": W8A8}, {})}.items():
        config = DENSE[family]()
        config.intermediate_size = 128
        outs[case] = export(config, tmp_path_factory.mktemp("case"), schemes, **options)
    spoil(outs["spoiled"])
    found = judge(list(outs.values()))
    return {case: found[out] for case, out in outs.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_server_loads_it(case: str, verdicts: dict[str, tuple[list[str], list[str]]]) -> None:
    errors, warnings = verdicts[case]
    assert errors == []
    assert [w for w in warnings if "float32 copied into" not in w] == []


def test_the_harness_finds_what_is_wrong(verdicts: dict[str, tuple[list[str], list[str]]]) -> None:
    errors, _ = verdicts["spoiled"]
    assert any("Not all shards" in error for error in errors)


def test_the_rest_of_the_directory(tmp_path: Path) -> None:
    """What can be seen without the server."""
    out = export(DENSE["smollm2"](), tmp_path, MIXED, untie=True)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    index = json.loads((out / "quant_model_weights.safetensors.index.json").read_text())["weight_map"]
    description = json.loads((out / "quant_model_description.json").read_text())
    assert set(index) == {key for key, value in description.items() if "." in key and isinstance(value, str)}
    assert description["lm_head.weight"] == "FLOAT"
    assert description["model_quant_type"] == "W4A4_DYNAMIC"
    assert len(list(out.glob("*.safetensors"))) == len(set(index.values())) > 1


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (export(DENSE["llama"](), tmp_path / run, MIXED) for run in ("a", "b"))
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
