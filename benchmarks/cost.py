"""What a W8A8 compile costs, as a multiple of what cannot be avoided.

``python -m benchmarks.cost`` measures in one run: a forward of SmolLM2-135M over the calibration set (32 windows
of 512), reading its weights, writing as many bytes as the result has; then the whole compile, imports and capture
included; then the forward again, to show a change of the machine's pace. The forward is in bfloat16 where the CPU
has units for it, else in float32, which is several times faster there: the stricter measure. The aim: 3.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qc.compiler.calibration import calibration
from qc.compiler.half_linear import has_half_units

from .measure import run_qc
from .records import record, table
from .smollm2 import smollm2
from .texts import find_texts

PASSES, SCHEME = "iter_smooth,linear_quant", "w8a8"
SAMPLES, LENGTH, MICROBATCH = 32, 512, 4
AIM = 3.0
CHUNK = 1 << 24


def main() -> int:
    """Measure, print, record; 1 when the compile costs more than the aim."""
    texts, path = find_texts(), smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = calibration(texts.calibration, tokenizer, samples=SAMPLES, length=LENGTH).tokens
    dtype = torch.bfloat16 if has_half_units() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    forward(model, tokens[:MICROBATCH])  # the first call allocates and chooses kernels
    before = seconds(lambda: forward(model, tokens))
    read = seconds(lambda: read_weights(path))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        files = [argument for file in texts.calibration for argument in ("--calib", file)]
        run = run_qc(
            *("compile", path, "--passes", PASSES, "--scheme", SCHEME),
            *files,
            *("--samples", str(SAMPLES), "--length", str(LENGTH), "--out", out),
        )
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        written = seconds(lambda: write_bytes(Path(folder) / "bytes", size))
    after = seconds(lambda: forward(model, tokens))
    floor = (before + after) / 2 + read + written
    multiple = run.seconds / floor
    row = {
        "tokens": tokens.numel(),
        "dtype": str(dtype).removeprefix("torch."),
        "forward s": before,
        "forward again s": after,
        "read s": read,
        "write s": written,
        "compile s": run.seconds,
        "multiple": multiple,
        "aim": AIM,
        "peak MB": run.peak / 1e6,
        "threads": torch.get_num_threads(),
        "met": multiple <= AIM,
    }
    table(f"--passes {PASSES} --scheme {SCHEME}, {texts}", [row])
    record("cost", row)
    return 0 if multiple <= AIM else 1


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def forward(model: torch.nn.Module, tokens: Tensor) -> None:
    """One pass over [windows, length] token ids, a few windows at a time, logits dropped."""
    for batch in tokens.split(MICROBATCH):
        model(input_ids=batch, use_cache=False)


def read_weights(path: Path) -> None:
    """Read every tensor of a checkpoint into memory of its own, one after the other."""
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
                tensors.get_tensor(name).clone()


def write_bytes(file: Path, size: int) -> None:
    """Write `size` bytes and wait until they are on disk."""
    chunk = bytes(CHUNK)
    with file.open("wb") as out:
        for start in range(0, size, CHUNK):
            out.write(chunk[: size - start])
        out.flush()
        os.fsync(out.fileno())


if __name__ == "__main__":
    raise SystemExit(main())
