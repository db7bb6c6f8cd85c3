"""Names of schemes: groups and one scale per tensor, for any scheme."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.scheme import Int
from qc.compiler.scheme_names import scheme_named
from qc.passes.weight_scale import weight_scale
from qc.runtime.quantize import dequantize, quantize
from tests.homes import Home, compiled, logits, tensors_of
from tests.plans import planned
from tests.programs import relative


def test_a_suffix_changes_what_shares_a_scale_and_nothing_else() -> None:
    (plain,), (grouped,), (one,) = (scheme_named(f"w8a8-static{end}").rules for end in ("", "-g32", "-pt"))
    assert grouped.scheme.weight == Int(8, "group", group=32)
    assert one.scheme.weight == Int(8, "tensor")
    assert plain.scheme.act == grouped.scheme.act == one.scheme.act
    assert [str(rule.scheme) for rule in scheme_named("auto-g64").rules] == [
        "W8A8 g64",
        "W4A4 g64",
        "W8A8 g64",
    ]
    assert scheme_named("float-pt").rules == ()
    for text in ("w8a8-static-g32", "w4a16-pt"):
        assert scheme_named(text).rules[0].scheme.spelling == text


@pytest.mark.parametrize("name", ["w8a9-g32", "w8a8-g0", "w8a8-gx", "w8a8-pq", "-pt"])
def test_what_is_no_scheme_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="unknown scheme"):
        scheme_named(name)


@pytest.mark.parametrize("method", ["minmax", "ssz", "clip"])
def test_one_scale_per_tensor_is_the_best_one_for_all_rows(method: str) -> None:
    weight = (
        torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 8)[:, None]
    )
    importance = torch.linspace(0.1, 2, 32)
    scale = weight_scale(weight, Int(4, "tensor"), torch.float32, method, importance)
    assert scale.shape == (8, 1)
    assert len(set(scale.flatten().tolist())) == 1

    def off(scale: torch.Tensor) -> float:
        error = (dequantize(quantize(weight, scale, 4), scale) - weight).square()
        return float((error * (importance if method == "clip" else 1.0)).sum())

    plain = weight.abs().max() / 7
    assert off(scale) <= off(plain.expand(8, 1)) * (1 + 1e-6)


@pytest.mark.broad
@pytest.mark.parametrize("passes", ["linear_quant", "gptq", "autoround{iters=2}"])
def test_one_scale_per_tensor_is_stored_in_every_channels_place(
    passes: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place = home("llama-128")
    compiled(place, tmp_path / "out", passes, scheme="w4a16-pt", target="modelslim")
    scales = {n: t for n, t in tensors_of(tmp_path / "out").items() if n.endswith("weight_scale")}
    assert len(scales) == 7 * len(place.program.blocks)
    assert all(len(set(scale.flatten().tolist())) == 1 for scale in scales.values())
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, tmp_path / "out"))
    assert 1e-3 < relative(got, want) < 0.6


def test_a_server_with_scales_per_channel_takes_one_per_tensor() -> None:
    found = planned("llama-128", "linear_quant", scheme="w8a8-pt", target="vllm-ascend")
    assert found.problems == ()
    assert {str(node.meta["scheme"]) for node in found.final.graph.nodes if "scheme" in node.meta} == {
        "W8A8 weights per tensor"
    }
