"""All families through the same plans and compiles: a result that computes the same, or a refusal with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qc.compiler.load import load
from tests.families import ALL
from tests.homes import Home, compiled, logits, tensors_of
from tests.plans import planned
from tests.programs import relative

HEADLINE = "iter_smooth,quarot,autoround{iters=2}"
PLAIN = "iter_smooth,linear_quant"
GAIN = "post_attention_layernorm multiplies by its gain, which only linears could take over"
UNROTATED: dict[str, str] = dict.fromkeys(("gemma2", "gemma3"), GAIN)
"""Families whose residual stream can not be rotated, and what is in the way: norms behind attention and MLP."""
CENTRED = ("olmo", "cohere", "stablelm", "gpt_neox", "opt", "gpt2")
"""Families whose norms subtract the mean."""
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


@pytest.mark.parametrize("family", CENTRED)
def test_a_model_with_layer_norms_is_rotated_and_stays_one(
    family: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place = home(family)
    result = compiled(place, tmp_path / "out", "quarot,linear_quant", scheme="w8a8", target="modelslim")
    (step,) = [step for step in result.plan.steps if step.what.name == "rotate_residual"]
    (rewrite,) = step.answer.rewrites
    assert rewrite.basis is not None
    assert rewrite.basis.rotation.keeps_ones
    assert "keep the twin's logits" in result.journal.entries[0]["outcome"] or place.program.twin is None
    assert result.journal.worst < 1e-12
    given, written = (tensors_of(path) for path in (place.path, tmp_path / "out"))
    norms = [name for name in given if "norm" in name and name.endswith("weight") and given[name].dim() == 1]
    assert all(
        bool((written[name] == 1).all()) for name in norms if given[name].numel() == given[norms[0]].numel()
    )
    assert {name for name in written if name.endswith(".bias")} == {n for n in given if n.endswith(".bias")}
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, tmp_path / "out"))
    assert 1e-4 < relative(got, want) < 0.06
