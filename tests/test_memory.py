"""The estimate of peak memory against what the same compile measures, in a process of its own."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from mmap import mmap
from pathlib import Path

import pytest
import torch

from benchmarks.measure import run_qc
from benchmarks.random_llama import Shape, write
from qc.compiler import resident
from qc.compiler.memory import KERNELS, Run, peak_of
from qc.compiler.plan import Plan
from tests.plans import planned

pytestmark = pytest.mark.broad

TOLERANCE = 0.25
HEADLINE = "iter_smooth,quarot,autoround{iters=1}"


@pytest.mark.parametrize(
    ("passes", "scheme", "above"),
    [
        ("iter_smooth,linear_quant", "w8a8", 1.2),
        pytest.param(HEADLINE, "auto", 1.6, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_within_a_quarter_of_what_is_measured(
    tmp_path: Path, passes: str, scheme: str, above: float
) -> None:
    model = write(tmp_path / "model", Shape(layers=1, vocabulary=4000))
    options = ("--passes", passes, "--scheme", scheme, "--samples", "4", "--length", "256")
    run_qc("compile", model, *options, "--out", tmp_path / "out")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    measured, estimated = run["peak_memory_bytes"], run["estimated_peak_memory_bytes"]
    assert abs(estimated - measured) <= TOLERANCE * measured
    bare = int(
        subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=True).stdout
    )
    assert measured > above * bare, "the compile holds so little that any estimate would do"


BARE = "import qc.compiler.compile, qc.compiler.resident; print(qc.compiler.resident.peak())"


def peak(plan: Plan, samples: int = 8, length: int = 64, compute: torch.dtype = torch.float32) -> int:
    return peak_of(plan, Run(samples, length, compute), process=0)


def test_more_tokens_and_a_second_stream_take_more_memory() -> None:
    plan = planned("llama-128", "linear_quant", scheme="w8a8")
    assert not plan.needs_data
    assert peak(plan) == peak(plan, samples=4000)
    data = planned("llama-128", "iter_smooth,linear_quant", scheme="w8a8")
    assert peak(data, samples=4000) > peak(data)
    assert peak(data, 4000) > peak(data, 4000, compute=torch.bfloat16)
    both = planned("llama-128", "iter_smooth,autoround{iters=0}", scheme="w8a8")
    one = planned("llama-128", "iter_smooth,autoround{iters=0,quantized_input=false}", scheme="w8a8")
    assert peak(both, 4000) > peak(one, 4000)
    assert peak(data) > KERNELS


def test_training_takes_more_memory_than_rounding_to_nearest() -> None:
    trained = planned("llama-128", "autoround{iters=2}", scheme="w4a4")
    start = planned("llama-128", "autoround{iters=0}", scheme="w4a4")
    nearest = planned("llama-128", "linear_quant", scheme="w4a4")
    assert peak(trained) > peak(start) > peak(nearest)


def test_resident_memory_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Held is a mapping of its own: a tensor may take pages that the heap has free and resident already."""
    size = 64 * 2**20
    gc.collect()
    before = resident.resident()
    with mmap(-1, size) as held:
        held.write(b"\1" * size)
        assert resident.resident() - before >= 0.9 * size
        assert resident.peak() >= resident.resident()
        resident.release()
        monkeypatch.setattr(resident, "STATUS", tmp_path / "none")
        assert resident.resident() == resident.peak() > size
