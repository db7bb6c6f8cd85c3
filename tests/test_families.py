"""All families through the same plans and compiles: a result that computes the same, or a refusal with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qc.compiler.load import load
from qc.compiler.safetensors_io import read_header
from tests.families import ALL
from tests.homes import Home, compiled, logits
from tests.plans import planned
from tests.programs import relative

HEADLINE = "iter_smooth,quarot,autoround{iters=2}"
PLAIN = "iter_smooth,linear_quant"
MEAN = "subtracts the mean, which only rotations that keep the all-ones vector allow"
GAIN = "post_attention_layernorm multiplies by its gain, which only linears could take over"
UNROTATED: dict[str, str] = {}
for _family in ("olmo", "cohere", "stablelm", "gpt_neox", "opt", "gpt2"):
    UNROTATED[_family] = MEAN
for _family in ("gemma2", "gemma3", "mixtral", "qwen3_moe"):
    UNROTATED[_family] = GAIN
"""Families whose residual stream can not be rotated yet, and what is in the way."""
TURNED = "its weight is stored as [in, out]"


@pytest.mark.parametrize("family", ALL)
def test_every_family_has_a_plan_or_a_refusal_with_its_reason(family: str) -> None:
    for target in ("modelslim", "vllm-ascend"):
        turned = [TURNED] if family == "gpt2" and target == "vllm-ascend" else []
        for passes, scheme, first in ((PLAIN, "w8a8", None), (HEADLINE, "auto", UNROTATED.get(family))):
            problems = planned(family, passes, scheme=scheme, target=target).problems
            expected = ([first] if first else []) + turned
            assert len(problems) == len(expected), problems
            assert all(words in problem for words, problem in zip(expected, problems, strict=True))


@pytest.mark.parametrize(
    "family", ["mistral", "gemma", "olmo", "cohere", "stablelm", "gpt_neox", "gemma2", "gemma3"]
)
def test_eight_bits_compute_what_the_model_computes(
    family: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place = home(family)
    compiled(place, tmp_path / "out", PLAIN, scheme="w8a8")
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, tmp_path / "out"))
    assert 1e-4 < relative(got, want) < 0.06


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_come_out_float_under_the_names_of_the_input(
    family: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home(family), tmp_path / "out"
    compiled(place, out, PLAIN, scheme="w8a8")
    given, written = (
        {name: entry for file in path.glob("*.safetensors") for name, entry in read_header(file).items()}
        for path in (place.path, out)
    )
    scales = {name for name in written if name.endswith(("weight_scale", "weight_offset"))}
    assert written.keys() - scales == given.keys()
    kinds = json.loads((out / "quant_model_description.json").read_text())
    experts = [name for name in given if ".experts." in name]
    assert len(experts) > 12
    assert {kinds[name] for name in experts} == {"FLOAT"}
    assert all(written[name].shape == given[name].shape for name in experts)
    assert {kinds[name] for name in given if "self_attn" in name and name.endswith("_proj.weight")} == {
        "W8A8_DYNAMIC"
    }
    assert "the experts of" in (out / "qc_plan.txt").read_text()
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, out))
    assert 1e-4 < relative(got, want) < 0.1
