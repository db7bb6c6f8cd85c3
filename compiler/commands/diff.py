"""``qc diff``."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import Refused
from .options import state_options, state_plan


def add(commands: Any) -> None:
    """Declare the command."""
    what = "print what every pass changes, as unified diffs of the text before and after it"
    command = commands.add_parser("diff", help=what, description=what)
    state_options(command, required=True)
    command.add_argument("--step", metavar="PASS", help="this pass only, or step N of the plan")
    command.add_argument("--layer", type=int, metavar="N", help="one block only")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc diff``: the changes, and a refusal behind them where the plan has problems."""
    from ..show.diff import changes
    from ..show.states import state_after, steps_named
    from ..show.terminal import DIFF, show

    plan = state_plan(args)
    assert plan is not None
    blocks = plan.program.blocks
    if args.layer is not None and not 0 <= args.layer < len(blocks):
        raise Refused(f"--layer {args.layer}: the model has layers 0 to {len(blocks) - 1}")
    chosen = range(len(plan.steps)) if args.step is None else steps_named(plan, args.step, "--step")
    out: list[str] = []
    for index in chosen:
        step = plan.steps[index]
        out.append(f"{index + 1}. {step.what}")
        found = changes(step.program, state_after(plan, index + 1).program)
        if args.layer is not None:
            found = [change for change in found if blocks[args.layer] in change.run.parts]
        for change in found:
            out += [
                f"--- {change.title}, before",
                f"+++ {change.title}, after {step.what.name}",
                *change.lines,
            ]
        out += [*([] if found else ["no row changes"]), ""]
    show("\n".join(out), DIFF)
    plan.require()
