"""``--max-memory``: smaller microbatches until the estimate fits, or a problem that names the largest item."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qc.compiler.memory as memory
from qc.compiler.compile import Options, compile
from qc.compiler.device import CPU
from qc.compiler.errors import Refused
from qc.compiler.memory import Run, peak_of
from qc.compiler.memory_limit import fitted, limits_of
from qc.compiler.plan import Plan
from tests.homes import SAMPLES, Home
from tests.plans import planned

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
    for text in ("cuda:0=8GiB", "8 lots", "", "cpu=", "0GiB"):
        with pytest.raises(Refused, match="--max-memory"):
            limits_of(text)


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
