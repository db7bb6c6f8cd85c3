"""What a quantized model costs on this CPU beside the float one: weight memory, prefill and decode.

``python -m benchmarks.runtime`` compiles SmolLM2-135M with 8-bit linears (``--scheme NAME`` takes another), loads
the float model in float32 and in bfloat16 and the quantized one, and times them in turn in one process: a pass over a
prompt, and single tokens behind a cache. Seconds are medians over the rounds. ``--checkpoint DIR`` takes a directory
that is compiled already.

Two clocks are read: the wall's, and the CPU time of the process, which other work on the machine does not enter.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from qc.compiler.load import load

from .measure import run_qc
from .records import record, table
from .smollm2 import smollm2

MEMORY_BAR = 0.55
"""Largest share of the float32 model's weight memory."""


@dataclass
class Timed:
    """Seconds of one kind of work of one model, a pair of (wall, CPU) per round."""

    rounds: list[tuple[float, float]] = field(default_factory=list)

    def add(self, work: Callable[[], Any], times: int = 1) -> None:
        """Run ``work`` so many times and note the mean."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            work()
        self.rounds.append(((time.perf_counter() - wall) / times, (time.process_time() - cpu) / times))

    @property
    def wall(self) -> float:
        """Median of the wall's seconds."""
        return median(wall for wall, _ in self.rounds)

    @property
    def cpu(self) -> float:
        """Median of the CPU's seconds."""
        return median(cpu for _, cpu in self.rounds)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the memory behind all parameters and buffers, memory that is shared counted once."""
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Decoder:
    """Greedy single tokens of one model behind a prompt whose cache is kept."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model = model
        self.prompt = prompt
        self.restart()

    def restart(self) -> None:
        """Start behind the prompt again."""
        out = self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def step(self) -> None:
        """One token."""
        out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)


@torch.inference_mode()
def measure(models: dict[str, Any], tokens: int, steps: int, rounds: int) -> dict[str, tuple[Timed, Timed]]:
    """Prefill of ``tokens`` and decode of single tokens of every model, in turn; the first round is thrown away."""
    text = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    times = {name: (Timed(), Timed()) for name in models}
    decoders = {name: Decoder(model, text[:, :64]) for name, model in models.items()}
    for turn in range(rounds + 1):
        for name, model in models.items():
            prefill, decode = times[name]
            prefill.add(lambda model=model: model(input_ids=text, use_cache=False, logits_to_keep=1))
            decoders[name].restart()
            decode.add(decoders[name].step, steps)
            if turn == 0:
                prefill.rounds.clear()
                decode.rounds.clear()
    return times


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, record; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--checkpoint", type=Path, help="a directory that qc compiled, in place of compiling")
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt")
    parser.add_argument("--steps", type=int, default=16, help="tokens per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    source = smollm2()
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint or Path(folder) / "quantized"
        if options.checkpoint is None:
            run_qc("compile", source, "--passes", "linear_quant", "--scheme", options.scheme,
                   "--samples", "1", "--length", "128", "--out", path)  # fmt: skip
        models = {
            "float32": load(source, dtype=torch.float32),
            "bfloat16": load(source),
            options.scheme: load(path),
        }
        times = measure(models, options.tokens, options.steps, options.rounds)
    rows = _rows(models, times, options.tokens, options.threads, options.scheme)
    table(f"SmolLM2-135M, prompt of {options.tokens} tokens, {options.threads} threads", rows)
    for row in rows:
        record("runtime", row)
    return 0 if rows[-1]["met"] else 1


def _rows(
    models: dict[str, Any], times: dict[str, tuple[Timed, Timed]], tokens: int, threads: int, scheme: str
) -> list[dict[str, Any]]:
    full, half = times["float32"], times["bfloat16"]
    bytes_ = {name: weight_bytes(model) for name, model in models.items()}
    rows: list[dict[str, Any]] = []
    for name, (prefill, decode) in times.items():
        memory = bytes_[name] / bytes_["float32"]
        met = memory <= MEMORY_BAR and prefill.cpu <= half[0].cpu and decode.cpu < full[1].cpu
        rows.append(
            {
                "row": name,
                "threads": threads,
                "weights MB": bytes_[name] / 1e6,
                "of float32": memory,
                "prefill tok/s": tokens / prefill.wall,
                "decode tok/s": 1 / decode.wall,
                "prefill / bfloat16": half[0].wall / prefill.wall,
                "decode / float32": full[1].wall / decode.wall,
                "prefill / bfloat16, CPU": half[0].cpu / prefill.cpu,
                "decode / float32, CPU": full[1].cpu / decode.cpu,
                "met": met if name == scheme else None,
            }
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
