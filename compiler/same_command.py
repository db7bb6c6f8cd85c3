"""The command that repeats a compile, as the model card and the report print it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from .calibration import Calibration
from .plan import OF_THE_PASSES, Plan

if TYPE_CHECKING:
    from .compile import Options


def same_command(plan: Plan, options: Options, data: Calibration | None) -> str:
    """``qc compile MODEL ... --out OUT``: everything that the weights depend on, without paths of this machine.

    Places that ``--fallback`` left float stand in the ``exclude`` of their passes, so they are not looked for again.

    Args:
        plan: What was compiled.
        options: With what, those of a recipe filled in.
        data: What it was calibrated on, if it was.
    """
    said = [f'qc compile MODEL --passes "{",".join(str(step.what) for step in plan.steps)}"']
    if options.chooses:
        budget, value = (
            ("avg-bits", options.avg_bits) if options.max_kl is None else ("max-kl", options.max_kl)
        )
        said.append(f"--{budget} {value:g}")
        said += [f"--choose-from {options.choose_from}"] if options.choose_from else []
    elif plan.scheme != OF_THE_PASSES:
        said.append(f"--scheme {plan.scheme.name}")
    said.append(f"--target {shlex.quote(plan.target.spelling)}")
    said += [f"--tp {plan.tp}"] if plan.tp != 1 else []
    said += [f"--seed {plan.seed}"] if plan.seed else []
    if data is not None or options.chooses:
        names = [shlex.quote(Path(file).name) for file in options.calib]
        said += [f"--calib {' '.join(names)}"] if names else []
        said.append(f"--samples {options.samples} --length {options.length}")
        said += ["--calibrate-all-experts"] if options.calibrate_all_experts else []
        said += [f"--dtype {options.dtype}"] if options.dtype != "auto" else []
        said += [f"--device {options.device}"] if options.device != "cpu" else []
        said += [f"--max-memory {options.max_memory}"] if options.max_memory else []
    said += ["--trust-remote-code"] if options.trust_remote_code else []
    return " ".join([*said, "--out OUT"])
