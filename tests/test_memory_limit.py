"""``--max-memory``: smaller microbatches until the estimate fits, or a problem that names the largest item."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import qc.compiler.compile as engine
import qc.compiler.memory as memory
import qc.compiler.view as view
from qc.compiler.compile import Options, compile
from qc.compiler.device import CPU
from qc.compiler.errors import Refused
from qc.compiler.memory import Run, device_peak_of, peak_of
from qc.compiler.memory_limit import fitted, limits_of
from qc.compiler.plan import Plan
from tests.homes import SAMPLES, Home, compiled, tensors_of
from tests.plans import planned

CARD = torch.device("cuda", 1)
LONG = Run(samples=64, length=16, compute=torch.float32)


@pytest.fixture(autouse=True)
def small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process holds is left out of the sum, so that a tiny model's microbatches are most of it."""
    monkeypatch.setattr(memory, "resident", lambda: 0)
    monkeypatch.setattr(memory, "peak", lambda: 0)
    monkeypatch.setattr(memory, "KERNELS", 0)


def plan_with(run: Run) -> Plan:
    return replace(planned("llama", "iter_smooth,linear_quant", scheme="w8a8"), run=run)


def test_sizes_are_read() -> None:
    assert limits_of("8GiB") == limits_of("cpu=8GiB") == {CPU: 8 * 2**30}
    assert limits_of("cpu = 1.5 GB") == {CPU: 1_500_000_000}
    for text in ("cuda:0=8GiB", "8 lots", "", "cpu=", "0GiB", "cpu=1GiB,2GiB"):
        with pytest.raises(Refused, match="--max-memory"):
            limits_of(text)


def test_each_device_has_a_limit_of_its_own() -> None:
    both = limits_of("cpu=8GiB, cuda:1=512MiB", CARD)
    assert both == {CPU: 8 * 2**30, CARD: 2**29} == limits_of("8GiB,cuda=512MiB", CARD)
    with pytest.raises(Refused, match=r"no block runs on cuda:0; blocks run on cuda:1"):
        limits_of("cuda:0=8GiB", CARD)
    with pytest.raises(Refused, match=r"give --device cuda:0 too"):
        limits_of("cuda:0=8GiB")
    with pytest.raises(Refused, match="twice"):
        limits_of("cuda=1GiB,cuda:1=1GiB", CARD)


def test_what_runs_lies_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CONTEXT", 0)
    there = replace(LONG, device=CARD)
    whole = plan_with(there)
    assert device_peak_of(plan_with(LONG), LONG) == 0
    assert peak_of(whole, there) < peak_of(whole, LONG), "the host no longer holds what runs"
    small = replace(there, tokens=16)
    assert peak_of(whole, small) == peak_of(whole, there), "microbatches are none of the host's business"
    least, most = device_peak_of(whole, small), device_peak_of(whole, there)
    assert least < most
    between = fitted(whole, {CARD: (least + most) // 2})
    assert not between.problems
    assert between.run is not None
    assert 16 <= between.run.tokens < LONG.tokens
    assert between.notes[-1] == f"--max-memory: {between.run.microbatch} tokens run at once"
    (problem,) = fitted(whole, {CARD: 1000, CPU: 2**40}).problems
    assert problem.startswith("--max-memory cuda:1=1 KiB: about ")
    assert "the largest item is model.layers." in problem
    assert len(fitted(whole, {CARD: 1000, CPU: 1000}).problems) == 2


@pytest.mark.parametrize("passes", ["flatquant,linear_quant", "autoround{iters=2}"])
def test_a_training_makes_weights_again_before_anything_else_is_cut(
    passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PROOF_TOKENS", 0)
    wide = Run(samples=1, length=2, compute=torch.float32)
    plan = replace(planned("llama-128", passes, scheme="w4a4", target="modelslim"), run=wide)
    most, least = peak_of(plan, wide), peak_of(plan, replace(wide, recompute=True))
    assert least < most
    found = fitted(plan, {CPU: (least + most) // 2})
    assert found.run == replace(wide, recompute=True)
    assert not found.problems
    assert found.notes[-1] == "--max-memory: trainings make their weights again in the backward pass"
    assert fitted(plan, {CPU: most}) is plan


@pytest.mark.broad
@pytest.mark.parametrize("passes", ["iter_smooth,flatquant{iters=2},linear_quant", "autoround{iters=2}"])
def test_weights_that_are_made_again_are_the_same(
    home: Callable[[str], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: str
) -> None:
    given: Any = {"scheme": "w4a4", "dtype": "float32", "target": "modelslim"}
    kept = compiled(home("llama-128"), tmp_path / "kept", passes, **given)
    calls: list[Any] = []
    monkeypatch.setattr(view, "checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k))
    monkeypatch.setattr(
        engine, "fitted", lambda plan, limits: replace(plan, run=replace(plan.run, recompute=True))
    )
    again = compiled(home("llama-128"), tmp_path / "again", passes, max_memory="999GiB", **given)
    assert calls
    ours, theirs = tensors_of(kept.path), tensors_of(again.path)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_microbatches_shrink_until_the_estimate_fits() -> None:
    whole = plan_with(LONG)
    least = peak_of(whole, replace(LONG, tokens=16))
    most = peak_of(whole, LONG)
    assert least < most
    assert fitted(whole, {CPU: most}).run == LONG
    between = fitted(whole, {CPU: (least + most) // 2})
    assert not between.problems
    assert between.run is not None
    assert 16 <= between.run.tokens < LONG.tokens
    assert peak_of(between, between.run) <= (least + most) // 2


def test_too_little_names_the_largest_item() -> None:
    (problem,) = fitted(plan_with(LONG), {CPU: 1000}).problems
    assert "with one sequence at a time" in problem
    assert "the largest item is model.layers." in problem
    many = replace(LONG, samples=100_000)
    (problem,) = fitted(plan_with(many), {CPU: 1000}).problems
    assert "the values between blocks, of all calibration tokens" in problem
    assert "fewer --samples" in problem


@pytest.mark.broad
def test_a_compile_keeps_to_it(home: Callable[[str], Home], tmp_path: Path) -> None:
    """One sequence at a time gives what all at once gives, to rounding; too little is refused before any work."""
    place = home("llama")
    given = Options(calib=(place.text,), scheme="w8a8", dtype="float32", **SAMPLES)
    run = Run(SAMPLES["samples"], SAMPLES["length"], torch.float32, (str(place.text),))
    plan = replace(planned("llama", "iter_smooth,linear_quant", scheme="w8a8"), run=run)
    least = peak_of(plan, replace(run, tokens=SAMPLES["length"]))
    roomy = compile(place.program, "iter_smooth,linear_quant", tmp_path / "roomy", given)
    tight = compile(
        place.program,
        "iter_smooth,linear_quant",
        tmp_path / "tight",
        replace(given, max_memory=f"{int(least * 1.02)}"),
    )
    assert tight.plan.run is not None
    assert roomy.plan.run is not None
    assert tight.plan.run.microbatch < roomy.plan.run.microbatch
    assert tight.journal.passes(tight.plan.rewrites)[0].startswith("iter_smooth")
    with pytest.raises(Refused, match="largest item"):
        compile(
            place.program, "iter_smooth,linear_quant", tmp_path / "none", replace(given, max_memory="1MiB")
        )
    assert not (tmp_path / "none").exists()
