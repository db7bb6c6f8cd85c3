"""What each phase of a block holds at its peak, as the estimate has it, for a config of Qwen3-8B's shape.

``python -m benchmarks.memory_items`` prints the table of ``docs/architecture.md``, in GiB; nothing is run.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from qc.compiler.capture import capture
from qc.compiler.memory import Run, device_peak_of, peak_of, phases_of
from qc.compiler.plan import make_plan
from qc.compiler.program import Program

from .plan_cost import CONFIG

SHAPE = {"num_hidden_layers": 2, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32}
PLANS = (
    ("iter_smooth,quarot,linear_quant", "w8a8"),
    ("iter_smooth,quarot,autoround", "auto"),
    ("iter_smooth,flatquant,gptq", "w4a4"),
)
RUN = Run(32, 512, torch.bfloat16)
GIB = 2**30


def rows(program: Program) -> dict[str, list[str]]:
    """Item to its GiB in each plan; where two numbers stand, the second is with everything cut that can be."""
    found: dict[str, list[str]] = {}
    totals: dict[str, list[str]] = {}
    for number, (passes, scheme) in enumerate(PLANS):
        plan = make_plan(program, passes, scheme=scheme, run=RUN)
        small = replace(RUN, tokens=RUN.length, recompute=True)
        whole, cut = (phases_of(plan, run, program.blocks[0]) for run in (RUN, small))
        for name, size in whole.items():
            cells = found.setdefault(name, [""] * len(PLANS))
            cells[number] = " / ".join(dict.fromkeys(f"{one / GIB:.2f}" for one in (size, cut[name])))
        there = [replace(run, device=torch.device("cuda", 0)) for run in (RUN, small)]
        peaks = {
            "peak on the CPU": [peak_of(plan, run, process=0) for run in (RUN, small)],
            "peak of the CPU beside a device": [peak_of(plan, run, process=0) for run in there],
            "peak of the device": [device_peak_of(plan, run) for run in there],
        }
        for name, sizes in peaks.items():
            cells = totals.setdefault(name, [""] * len(PLANS))
            cells[number] = " / ".join(dict.fromkeys(f"{size / GIB:.2f}" for size in sizes))
    return found | totals


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIG | SHAPE), encoding="utf-8")
        program = capture(folder, certify=False)
        table = rows(program)
    print("| | " + " | ".join(f"`{passes}`, {scheme}" for passes, scheme in PLANS) + " |")
    print("| --- |" + " --- |" * len(PLANS))
    for name, cells in table.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
