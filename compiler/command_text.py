"""The command that makes an output again, as card and report tell it: files by their names, no path of this machine."""

from __future__ import annotations

import shlex
from pathlib import Path

from .plan import OF_THE_PASSES, Plan


def command_text(plan: Plan) -> str:
    """``qc compile MODEL ... --out OUT`` for a plan; how calibration ran is there where the plan needs data."""
    said = ["--passes", f'"{",".join(str(step.what) for step in plan.steps)}"']
    said += ["--scheme", plan.scheme.name] if plan.scheme.name != OF_THE_PASSES.name else []
    said += ["--target", shlex.quote(plan.target.spelling)]
    said += ["--tp", str(plan.tp)] if plan.tp > 1 else []
    said += ["--seed", str(plan.seed)] if plan.seed else []
    if plan.run is not None and plan.needs_data:
        calib = [shlex.quote(Path(file).name) for file in plan.run.calib]
        said += ["--calib", *calib] if calib else []
        said += ["--samples", str(plan.run.samples), "--length", str(plan.run.length)]
    return f"qc compile MODEL {' '.join(said)} --out OUT"
