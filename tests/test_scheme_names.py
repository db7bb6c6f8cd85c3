"""Names of schemes: groups and one scale per tensor, for any scheme."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.scheme import Int
from qc.compiler.scheme_names import scheme_named
from qc.compiler.verify import verify
from qc.passes.column_rounding import gptq
from qc.passes.sign_sgd import Rounding
from qc.passes.weight_scale import weight_grid, weight_scale
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
    for text in ("w8a8-static-g32", "w4a16-pt", "w8a16-asym", "w4a16-g32-asym", "w4a16-pt-asym"):
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


def off_center(seed: int = 0) -> torch.Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)).abs() + 0.5


@pytest.mark.parametrize("method", ["minmax", "clip"])
@pytest.mark.parametrize("format", [Int(4, "channel"), Int(4, "group", group=16), Int(4, "tensor")])
def test_offsets_help_weights_that_are_off_center(method: str, format: Int) -> None:
    weight, errors = off_center(), []
    for symmetric in (True, False):
        scale, offset = weight_grid(weight, replace(format, symmetric=symmetric), torch.float32, method)
        assert (offset is None) == symmetric
        q = quantize(weight, scale, 4, offset)
        errors.append(float((dequantize(q, scale, offset) - weight).square().sum()))
    assert errors[1] < 0.5 * errors[0]


def test_gptq_and_training_round_on_a_grid_with_offsets() -> None:
    weight, x = off_center(), torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    scale, offset = weight_grid(weight, Int(4, "group", group=16, symmetric=False), torch.float32, "clip")
    integers, compensated = gptq(weight, scale, x.T @ x / 256, 4, offset=offset)
    assert torch.equal(quantize(compensated, scale, 4, offset).float(), integers)
    trained = Rounding(compensated, scale, 4, torch.float32, zero=offset)
    torch.testing.assert_close(trained.fake().detach(), dequantize(integers, scale, offset))
    assert torch.equal(trained.result()[0].float(), integers)


@pytest.mark.broad
@pytest.mark.parametrize("passes", ["linear_quant{weight_method=clip}", "gptq", "autoround{iters=2}"])
@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w8a16-asym", "w4a4-asym"])
def test_what_has_offsets_loads_as_it_was_rounded(
    passes: str, scheme: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, errors = home("llama"), []
    for name in (scheme, scheme.removesuffix("-asym")):
        compiled(place, tmp_path / name, passes, scheme=name, target="modelslim")
        want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, tmp_path / name))
        errors.append(relative(got, want))
    offsets = [t for n, t in tensors_of(tmp_path / scheme).items() if n.endswith("weight_offset")]
    assert any(bool(offset.any()) for offset in offsets)
    assert not [str(check) for check in verify(tmp_path / scheme) if check.wrong]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("scheme", ["w8a8-asym", "w4a4-g32-asym", "w8a8-dynamic-tensor-pt-asym"])
def test_offsets_beside_integer_activations_are_for_those_that_read_them(scheme: str) -> None:
    assert planned("llama-128", "linear_quant", scheme=scheme, target="modelslim").problems == ()
    found = planned("llama-128", "linear_quant", scheme=scheme, target="vllm-ascend").problems
    assert found


def test_offsets_stand_where_there_is_a_place_for_them() -> None:
    for scheme in ("w8a8-static-asym", "w8a8-mix-asym", "w4a8-asym"):
        found = planned("llama-128", "linear_quant", scheme=scheme, target="modelslim").problems
        assert any("no type for" in problem for problem in found)
    found = planned("llama-128", "linear_quant", scheme="w8a8-asym", target="vllm-ascend").problems
    assert any("offsets of its weight, which the server's W8A8_DYNAMIC ignores" in p for p in found)
    assert planned("llama-128", "linear_quant", scheme="w8a16-asym", target="vllm-ascend").problems == ()
    found = planned(
        "llama-128", "linear_quant{weight_method=ssz}", scheme="w4a16-asym", target="modelslim"
    ).problems
    assert any("ssz finds scales of symmetric weights" in problem for problem in found)
