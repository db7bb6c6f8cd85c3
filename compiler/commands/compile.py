"""``qc compile``."""

from __future__ import annotations

import argparse
from typing import Any

from .options import check_curve, options_of, passes_of, plan_options, print_after, show_choice


def add(commands: Any) -> None:
    """Declare the command."""
    what = "compile a model into a quantized checkpoint"
    command = commands.add_parser("compile", help=what, description=what)
    plan_options(command)
    command.add_argument("--out", required=True, metavar="DIR", help="directory to make")
    command.add_argument(
        "--fallback", default="L0", metavar="LK",
        help="leave the K most sensitive places float, found on the calibration data (L5)",
    )  # fmt: skip
    command.add_argument(
        "--timings", action="store_true", help="let report.html tell of this run: seconds, memory, host"
    )
    command.add_argument(
        "--force", action="store_true", help="replace DIR when it is an output of qc or a checkpoint"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc compile``."""
    from ..compile import compile, plan
    from ..progress import shown
    from ..report.page import REPORT

    check_curve(args)
    options = options_of(args)
    model = args.model
    if args.print_after:
        planned = plan(model, passes_of(args), options).require()
        print_after(args, planned)
        model = planned.program
    with shown() as report:
        result = compile(model, passes_of(args), args.out, options, report)
    show_choice(args, result.plan)
    journal = result.journal
    data = result.calibration
    if data is not None:
        fewer = f", fewer than the {options.samples} asked for" if len(data.tokens) < options.samples else ""
        print(f"calibrated on {data}{fewer}")
    if journal.idle_experts:
        first, count = journal.idle_experts[0], len(journal.idle_experts)
        print(
            f"{count} experts saw no calibration token, {first} first: their activation statistics are those of the"
            " other experts of the layer, their weights are rounded to nearest. More --samples, or"
            " --calibrate-all-experts"
        )
    for line in journal.passes(result.plan.rewrites):
        print(line)
    print(f"wrote {result.path}, see {result.path / REPORT}")
