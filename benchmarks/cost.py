"""What compiles cost, as multiples of what cannot be avoided.

``python -m benchmarks.cost [w8a8] [gptq] [autoround] [--threads N] [--blocks N]`` (all by default, on one thread)
measures each beside its floor, in one run, on SmolLM2-135M, or its first N blocks, and 32 windows of 512 tokens;
compiles are whole processes, imports and capture included. Time by the clock and time on the CPU are printed. Other
work on the machine enters the first far more than the second, so that the aim is one of the second.

- ``w8a8``: a forward over the calibration set before and after, reading the weights, writing as many bytes as the
  result has. In bfloat16 where the CPU has units for it, else in float32, which is several times faster there.
- ``gptq`` (W4A4): the products X Xᵀ of all tokens in float32 and the factorisations in float64 for every value that
  linears read, as many as the model has.
- ``autoround`` (W4A16 in groups of 64): forward and backward of a decoder layer as transformers runs it, one microbatch
  per step, as many steps as the model takes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qc.compiler.calibration import calibration
from qc.compiler.half_linear import has_half_units

from .measure import run_qc
from .records import Row, record, table
from .smollm2 import smollm2
from .texts import Texts, find_texts

SAMPLES, LENGTH, MICROBATCH = 32, 512, 4
ITERS = 50
SAMPLED = 5
"""One decoder layer in so many is measured for the floors of gptq and autoround, and counts as often."""
CHUNK = 1 << 24


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock on the wall, and on the CPU in all threads."""

    wall: float
    cpu: float

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.cpu + other.cpu)


@dataclass(frozen=True)
class Case:
    """What is compiled, and how many floors it may take."""

    passes: str
    scheme: str
    aim: float
    target: str = "vllm-ascend"


CASES = {
    "w8a8": Case("iter_smooth,linear_quant", "w8a8", 3.0),
    "gptq": Case("gptq", "w4a4", 4.0),
    "autoround": Case(f"autoround{{iters={ITERS}}}", "w4a16-g64", 1.3, "modelslim"),
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, record; 1 when a compile costs more than its aim."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", nargs="*", help=f"what to measure (default: {' '.join(CASES)})")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, in both (default 1)")
    parser.add_argument(
        "--blocks", type=int, default=0, help="of the model, from the first one on (default: all)"
    )
    options = parser.parse_args(arguments)
    wanted = options.case or list(CASES)
    if unknown := sorted(set(wanted) - set(CASES)):
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the compiles
    texts, path = find_texts(), smollm2()
    tokens = calibration(
        texts.calibration, AutoTokenizer.from_pretrained(path), samples=SAMPLES, length=LENGTH
    ).tokens
    dtype = torch.bfloat16 if has_half_units() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        if options.blocks:
            path = cut(model, path, options.blocks, Path(folder))
        forward(model, tokens[:MICROBATCH])  # the first call allocates and chooses kernels
        rows = [_measured(name, model, tokens, texts, path) for name in wanted]
    table(f"multiples of what cannot be avoided, {texts}", rows)
    return 0 if all(row["met"] for row in rows) else 1


def cut(model: torch.nn.Module, path: Path, blocks: int, folder: Path) -> Path:
    """Keep the first blocks of a model; the checkpoint of it, beside the tokenizer of the whole one."""
    model.model.layers = model.model.layers[:blocks]  # type: ignore[union-attr, index]
    model.config.num_hidden_layers = blocks  # type: ignore[union-attr]
    model.save_pretrained(folder)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder


def _measured(name: str, model: torch.nn.Module, tokens: Tensor, texts: Texts, path: Path) -> Row:
    case = CASES[name]
    before = floor(name, model, tokens)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        files = [argument for file in texts.calibration for argument in ("--calib", file)]
        run = run_qc(
            *("compile", path, "--passes", case.passes, "--scheme", case.scheme, "--target", case.target),
            *files,
            *("--samples", str(SAMPLES), "--length", str(LENGTH), "--out", out),
        )
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        moved = Spent(0, 0)
        if name == "w8a8":
            moved = spent(lambda: read_weights(path)) + spent(
                lambda: write_bytes(Path(folder) / "bytes", size)
            )
    before, after = before + moved, floor(name, model, tokens) + moved
    multiple = run.cpu / ((before.cpu + after.cpu) / 2)
    row: Row = {
        "case": name,
        "passes": case.passes,
        "scheme": case.scheme,
        "blocks": len(model.model.layers),  # type: ignore[union-attr, arg-type]
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "floor s": before.wall,
        "again s": after.wall,
        "compile s": run.seconds,
        "multiple of s": run.seconds / ((before.wall + after.wall) / 2),
        "floor CPU s": before.cpu,
        "again CPU s": after.cpu,
        "compile CPU s": run.cpu,
        "multiple": multiple,
        "aim": case.aim,
        "peak MB": run.peak / 1e6,
        "met": multiple <= case.aim,
    }
    record("cost", row)
    return row


def floor(name: str, model: torch.nn.Module, tokens: Tensor) -> Spent:
    """The time that a case can not avoid."""
    if name == "w8a8":
        return spent(lambda: forward(model, tokens))
    layers = model.model.layers  # type: ignore[union-attr]
    work = hessians if name == "gptq" else steps
    found, some = Spent(0, 0), layers[::SAMPLED]  # type: ignore[index]
    for one in some:
        found += spent(lambda one=one: work(one, model, tokens))  # type: ignore[arg-type]
    share = len(layers) / len(some)  # type: ignore[arg-type]
    return Spent(found.wall * share, found.cpu * share)


@torch.no_grad()
def hessians(layer: torch.nn.Module, model: torch.nn.Module, tokens: Tensor) -> None:
    """X Xᵀ over all tokens in float32, and the two factorisations of its inverse in float64, per value that is read."""
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        width = layer.get_submodule(name).in_features
        x, total = torch.randn(MICROBATCH * LENGTH, width), torch.zeros(width, width)  # type: ignore[call-overload]
        for _ in range(len(tokens) // MICROBATCH):
            total.addmm_(x.T, x)
        total = total.double()
        total.diagonal().add_(0.01 * total.diagonal().mean())
        torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(total)), upper=True)


def steps(layer: torch.nn.Module, model: torch.nn.Module, tokens: Tensor) -> None:
    """As many forward and backward passes of a layer as the training takes, one microbatch of 1024 tokens each."""
    hidden = torch.randn(1024 // LENGTH, LENGTH, model.config.hidden_size, dtype=model.dtype)  # type: ignore[union-attr]
    positions = torch.arange(LENGTH)[None]
    rotary = model.model.rotary_emb(hidden, positions)  # type: ignore[union-attr, operator]
    for _ in range(ITERS):
        layer(hidden, position_embeddings=rotary, attention_mask=None).float().square().mean().backward()
        layer.zero_grad()


def spent(work: Callable[[], object]) -> Spent:
    """Time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


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
