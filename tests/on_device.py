"""``--device``: every pass on a device of its own gives what it gives on the host, and nothing mixes the two.

``tests/test_device.py`` runs this file in a process of its own. The device is simulated, by
``tests/simulated_device.py``: it refuses an op with tensors of both sides, so a compile that ends has mixed nothing.
Where there is a CUDA card, the same compiles run on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3MoeConfig

from benchmarks.random_llama import character_tokenizer
from qc.compiler import device as devices
from qc.compiler.capture import capture
from qc.compiler.compile import Options, Result, compile, compute_dtype
from qc.compiler.device import device_named, doubled, has_float64
from qc.compiler.errors import Failed, Refused
from qc.compiler.program import Program
from qc.passes.smooth_quant import SmoothQuant
from tests import simulated_device
from tests.families import GQA, build
from tests.homes import TEXT, tensors_of
from tests.programs import captured
from tests.simulated_device import NAME, Lacking, memory, simulated

SIM = simulated()
"""Known from here on: autograd counts the devices before its first backward pass."""
PASSES = {
    "linear_quant": "w8a8",
    "smooth_quant,linear_quant{act_method=histogram}": "w8a8-static",
    "linear_quant{weight_method=ssz}": "w4a8",
    "iter_smooth{symmetric=false},linear_quant{weight_method=clip}": "w4a16-g64-asym",
    "quarot{online=true},gptq": "w4a4",
    "flex_smooth_quant{alpha=0.5},linear_quant": "w8a8",
    "flex_awq_ssz,linear_quant": "w8a8",
    "awq{n_grid=4},float_sparse": "w8a8",
    "adapt_rotation{steps=3},linear_quant": "w4a4",
    "spqr": "w4a16-g64-asym",
    "svd_res{rank=4},linear_quant": "w8a8",
    "outlier_channels{threshold=0.5},linear_quant": "w8a8",
    "kv_smooth,dynamic_cache,linear_quant": "w8a8",
    "fa3_quant{fa_amp=1,fa_v=per_token,recall_qk=0.9},linear_quant": "w8a8",
    "quarot_online,linear_quant": "w4a4",
}
"""Passes and the scheme that they are compiled in; with `LEARNED` they hold every pass that has something to solve."""
NEAR = 2e-3
"""What a step of one scale in the other direction may change."""
LEARNED = {
    "iter_smooth,flatquant{iters=2},linear_quant": ("w4a4", 1e-4),
    "iter_smooth,quarot,autoround{iters=2}": ("auto", NEAR),
}
"""Where gradients that come together by several ways are added in another order, and the last bits are others.

With the scheme, and the share of integers and the distance of floats that are allowed.

A scale of autoround steps by the sign of its gradient: where that is next to nothing, the last bits turn it.
"""


def model(config: Any) -> Program:
    """A program with small weights in memory."""
    made = build(config)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                weight.mul_(0.5)
    return capture(made, certify=False)


@cache
def llama() -> Program:
    """Two blocks."""
    return model(LlamaConfig(**GQA | {"num_hidden_layers": 2, "intermediate_size": 128}))


@cache
def experts() -> Program:
    """One block with a mixture."""
    return model(
        Qwen3MoeConfig(
            **GQA | {"num_hidden_layers": 1, "head_dim": 16}, moe_intermediate_size=32, num_experts=4,
            num_experts_per_tok=2, decoder_sparse_step=1,
        )
    )  # fmt: skip


@pytest.fixture(autouse=True)
def sim() -> Iterator[torch.device]:
    """The simulated device, whole again after a test."""
    yield SIM
    Lacking.float64 = False
    has_float64.cache_clear()


Compile = Callable[..., Result]


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    """Compile a program on a device into a directory of its own."""
    text = tmp_path / "calibration.txt"
    text.write_text(TEXT * 8, encoding="utf-8")
    number = count()

    def run(program: Program, passes: Any, device: str = "cpu", **options: Any) -> Result:
        given = {"samples": 6, "length": 24, "dtype": "float32", "target": "modelslim"} | options
        chosen = Options(calib=(text,), tokenizer=character_tokenizer(), device=device, **given)
        return compile(program, passes, tmp_path / f"{device.replace(':', '-')}-{next(number)}", chosen)

    return run


def same(left: Result, right: Result, *, tolerance: float = 0.0) -> None:
    """The files of both hold the same bytes, or numbers that are as near as ``tolerance`` says."""
    ours, theirs = tensors_of(left.path), tensors_of(right.path)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if not tolerance:
            assert torch.equal(tensor, theirs[name]), name
            continue
        if not tensor.is_floating_point():
            assert (tensor != theirs[name]).float().mean() <= tolerance, name
            continue
        distance = (tensor.float() - theirs[name].float()).norm()
        assert distance <= tolerance * tensor.float().norm(), name


@pytest.mark.broad
@pytest.mark.parametrize(("passes", "scheme"), PASSES.items())
def test_files_are_those_of_the_host_byte_for_byte(compiled: Compile, passes: str, scheme: str) -> None:
    before = simulated_device.ops
    there = compiled(llama(), passes, NAME, scheme=scheme)
    assert simulated_device.ops > before + 100, "nothing ran on the device"
    assert not memory.held, "something of a block stays on the device"
    same(compiled(llama(), passes, scheme=scheme), there)


@pytest.mark.broad
@pytest.mark.parametrize(("passes", "allowed"), LEARNED.items())
def test_what_is_learned_differs_in_the_last_bits(
    compiled: Compile, passes: str, allowed: tuple[str, float]
) -> None:
    scheme, tolerance = allowed
    same(
        compiled(llama(), passes, scheme=scheme),
        compiled(llama(), passes, NAME, scheme=scheme),
        tolerance=tolerance,
    )


@pytest.mark.broad
def test_rows_go_to_their_experts(compiled: Compile) -> None:
    passes = "iter_smooth,autoround{iters=1}"
    same(*(compiled(experts(), passes, device, scheme="w8a8") for device in ("cpu", NAME)))


@pytest.mark.broad
@pytest.mark.parametrize("family", ["gemma3", "gpt2", "opt"])
def test_what_blocks_of_other_families_hold_goes_along(compiled: Compile, family: str) -> None:
    program = captured(family)
    same(
        *(compiled(program, "linear_quant", d, scheme="w8a8-static", dtype="bfloat16") for d in ("cpu", NAME))
    )


@pytest.mark.broad
def test_formats_are_chosen_by_what_the_device_measures(compiled: Compile) -> None:
    budget = {"avg_bits": 12.0, "choose_from": "w8a8,float"}
    here, there = (compiled(llama(), "iter_smooth,linear_quant", d, **budget) for d in ("cpu", NAME))
    assert here.plan.choice == there.plan.choice
    same(here, there)
    left = [compiled(llama(), "linear_quant", d, scheme="w8a8", fallback="L1") for d in ("cpu", NAME)]
    assert left[0].plan.notes == left[1].plan.notes


@pytest.mark.broad
@pytest.mark.parametrize(
    ("passes", "scheme"),
    [
        ("linear_quant{act_method=histogram}", "w8a8-static"),
        ("iter_smooth,quarot,autoround{iters=1}", "auto"),
        ("adapt_rotation{steps=3},linear_quant", "w4a4"),
    ],
)
def test_a_device_without_float64_leaves_it_to_the_host(compiled: Compile, passes: str, scheme: str) -> None:
    Lacking.float64 = True
    has_float64.cache_clear()
    here, there = (compiled(llama(), passes, device, scheme=scheme) for device in ("cpu", NAME))
    same(here, there, tolerance=NEAR if "autoround" in passes else 0.0)


def test_float64_is_where_the_device_has_it(sim: torch.device) -> None:
    x = torch.ones(2).to(sim)
    assert doubled(x).device == sim
    assert doubled(torch.ones(2)).dtype == torch.float64
    Lacking.float64 = True
    has_float64.cache_clear()
    assert doubled(x).device.type == "cpu"
    assert torch.equal(doubled(x), torch.ones(2, dtype=torch.float64))


def test_the_simulation_refuses_what_cuda_refuses(sim: torch.device) -> None:
    here, there = torch.ones(2, 2), torch.ones(2, 2).to(sim)
    mixed: list[Callable[[], Any]] = [
        lambda: here + there, lambda: there @ here, lambda: torch.cat([there, here]),
        lambda: there[torch.tensor([0, 1])], lambda: there.masked_fill(here > 0, 0.0), lambda: here.add_(there),
        lambda: torch.where(here > 0, there, 0.0), lambda: torch.nn.functional.linear(there, there, here[0]),
        lambda: torch.rand(2, generator=torch.Generator(), device=sim), lambda: there.numpy(),
    ]  # fmt: skip
    for one in mixed:
        with pytest.raises((RuntimeError, TypeError), match="device"):
            one()
    assert torch.equal((there + torch.tensor(1.0)).cpu(), here + 1)
    assert torch.equal(here.copy_(there * 3), torch.full((2, 2), 3.0))
    weight = torch.arange(4.0).view(2, 2).to(sim).requires_grad_()
    (weight @ there).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.device == sim
    assert torch.equal(weight.grad.cpu(), torch.tensor([[4.0, 4.0], [20.0, 20.0]]))


@dataclass(frozen=True, kw_only=True)
class Careless(SmoothQuant):
    """Makes a tensor on the host and takes it for one of the block's."""

    name = "careless"

    def scale(self, found: Any) -> Tensor:
        scale = super().scale(found)
        return scale * torch.ones(len(scale))


@dataclass(frozen=True, kw_only=True)
class Careful(Careless):
    """Makes it where the block is; what it hands back may lie anywhere."""

    name = "careful"

    def scale(self, found: Any) -> Tensor:
        scale = SmoothQuant.scale(self, found)
        return (scale * torch.ones(len(scale), device=found.view.device)).cpu()


def test_a_pass_that_mixes_is_told_so(compiled: Compile, tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"careless at .*input_layernorm: it mixes .* device=view.device"):
        compiled(llama(), [Careless(), "linear_quant"], NAME, scheme="w8a8")
    assert not list(tmp_path.glob("sim-0-*"))
    same(*(compiled(llama(), [Careful(), "linear_quant"], device, scheme="w8a8") for device in ("cpu", NAME)))


def test_a_full_device_says_what_to_do(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    took = simulated_device.Memory.took

    def full(self: simulated_device.Memory, address: int, size: int) -> None:
        if size > 1000:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        took(self, address, size)

    monkeypatch.setattr(simulated_device.Memory, "took", full)
    with pytest.raises(Failed, match=r"layers.0: sim:0 has no memory left .* --max-memory sim:0=SIZE"):
        compiled(llama(), "linear_quant", NAME, scheme="w8a8-static")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda:0", "this PyTorch has no CUDA"), ("npu:0", "torch_npu"), ("mps", "this PyTorch has no MPS"),
        ("gpu", "no such device"), ("cuda:first", "no such device"), ("", "no such device"), ("cpu:1", "one cpu"),
        ("meta", "no meta"), ("sim:1", "there is sim:0"),
    ],
)  # fmt: skip
def test_a_device_that_is_not_there_is_refused(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    monkeypatch.setitem(devices.PACKAGES, "npu", "torch_npu_that_is_not_there")
    with pytest.raises(Refused, match=f"--device {name}: .*{words}"):
        Options(device=name)


def test_names_stand_for_devices(sim: torch.device) -> None:
    assert device_named("sim") == device_named("sim:0") == sim
    assert device_named("cpu") == device_named("cpu:0") == devices.CPU


def test_auto_is_bfloat16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(device=NAME)
    assert compute_dtype(llama(), options) == torch.bfloat16
    monkeypatch.setattr(simulated_device._Backend, "is_bf16_supported", lambda self: False)
    devices.has_bfloat16.cache_clear()
    assert compute_dtype(llama(), options) == torch.float32
    devices.has_bfloat16.cache_clear()


def test_what_the_device_took_is_written(compiled: Compile) -> None:
    run = json.loads(
        (compiled(llama(), "linear_quant", NAME, scheme="w8a8-static").path / "run.json").read_text()
    )
    assert run["device"] == NAME
    assert 0 < run["device_peak_memory_bytes"] < run["estimated_device_peak_memory_bytes"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
@pytest.mark.parametrize(("passes", "scheme"), (PASSES | LEARNED).items())
def test_a_cuda_card_gives_nearly_the_same(compiled: Compile, passes: str, scheme: str) -> None:
    """Sums are taken in another order there, and a training goes another way from the first such sum on."""
    here, there = (compiled(llama(), passes, device, scheme=scheme) for device in ("cpu", "cuda:0"))
    same(here, there, tolerance=0.05)
