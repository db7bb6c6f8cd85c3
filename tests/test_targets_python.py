"""Targets that Python loads: ``transformers`` and ``pt2``, through a whole compile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qc
import qc.hf
from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.targets.verdict import verdict
from tests.homes import Home, compiled, rows

SMOOTH = "iter_smooth,linear_quant"
CASES = [
    ("llama", "iter_smooth,quarot,linear_quant", "w4a16"),
    ("qwen2", SMOOTH, "w8a8-mix"),
    ("qwen3", "iter_smooth,linear_quant", "w8a8-static"),
    ("llama-128", "flatquant,linear_quant", "w4a4"),
    ("llama", "dynamic_cache,linear_quant", "w8a8"),
    ("llama", "fa3_quant{fa_k=per_token},linear_quant", "w8a8"),
    ("mixtral", "linear_quant", "experts-w4a8"),
    ("qwen3_moe", SMOOTH, "w8a8"),
]


def logits(model: Any) -> Tensor:
    ids, mask = rows()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.broad
@pytest.mark.parametrize(("family", "passes", "scheme"), CASES)
def test_transformers(
    home: Callable[[str], Home], tmp_path: Path, family: str, passes: str, scheme: str
) -> None:
    result = compiled(home(family), tmp_path / "out", passes, scheme=scheme, target="transformers")
    out = result.path
    names = {file.name for file in out.iterdir()}
    assert {"model.safetensors.index.json", "README.md", "config.json"} <= names
    assert "quant_model_description.json" not in names
    wanted = logits(load(out))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), wanted)
    assert (tmp_path / "saved" / "README.md").read_text() == (out / "README.md").read_text()
    assert [check.wrong for check in qc.verify(out)] == [()] * 4
    card = (out / "README.md").read_text()
    for said in (f"| scheme | {scheme} |", passes.split(",")[-1], 'from_pretrained("OUT")', "Not measured."):
        assert said in card
    (out / "README.md").write_text(card + "my own words\n")
    assert qc.verify(out)[0].wrong == ()


def test_an_ascendv1_directory_names_its_index(home: Callable[[str], Home], tmp_path: Path) -> None:
    out = compiled(home("llama"), tmp_path / "out", "linear_quant", scheme="w8a8").path
    config = json.loads((out / "config.json").read_text())
    assert config["transformers_weights"] == "quant_model_weights.safetensors.index.json"
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(out, quantization_config=qc.hf.Config())
    assert torch.equal(logits(model), logits(load(out)))
    with pytest.raises(Refused, match="quantized already"):
        qc.capture(str(compiled(home("llama"), tmp_path / "t", "linear_quant", target="transformers").path))


@pytest.mark.broad
@pytest.mark.parametrize(
    ("family", "passes", "scheme"),
    [
        ("llama", SMOOTH, "w8a8"),
        ("mixtral", SMOOTH, "w8a8"),
        ("qwen3", SMOOTH, "auto"),
        ("llama-128", "spqr{outliers=0.02}", "w4a16-g64"),
    ],
)
def test_pt2(home: Callable[[str], Home], tmp_path: Path, family: str, passes: str, scheme: str) -> None:
    out = compiled(home(family), tmp_path / "out", passes, scheme=scheme, target="pt2").path
    ids, mask = rows()
    with torch.no_grad():
        found, wanted = qc.load_program(out).module()(ids, mask), logits(load(out))
    off = (found.float() - wanted.float()).norm() / wanted.float().norm()
    assert off < 1e-2
    assert qc.verify(out)[0].wrong == ()
    assert verdict(out, "pt2").word == "loads"
    (out / "model.pt2").write_bytes(b"cut")
    assert [finding.tensor for finding in verdict(out, "pt2").findings] == ["model.pt2"]


@pytest.mark.real
@pytest.mark.broad
def test_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    out = qc.compile(smollm2, "linear_quant", out=tmp_path / "out", scheme="w8a8", target="transformers").path
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(100, 116).reshape(1, 16)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, load(out)(input_ids=ids).logits)
    config = json.loads((out / "config.json").read_text())
    assert len(config["quantization_config"]["modules"]["W8A8_DYNAMIC"]) == 7
    assert "model.layers.{0..29}.mlp.up_proj" in config["quantization_config"]["modules"]["W8A8_DYNAMIC"]
