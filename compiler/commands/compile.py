"""``qc compile``."""

from __future__ import annotations

import argparse
from typing import Any

from .options import check_curve, options_of, passes_of, plan_options, show_choice


def add(commands: Any) -> None:
    """Declare the command."""
    what = "compile a model into a quantized checkpoint"
    command = commands.add_parser("compile", help=what, description=what)
    plan_options(command)
    command.add_argument("--out", required=True, help="directory to make")
    command.add_argument(
        "--fallback", default="L0", metavar="LK",
        help="leave the K most sensitive places float, found on the calibration data (L5)",
    )  # fmt: skip
    command.add_argument("--force", action="store_true", help="replace OUT when it exists")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc compile``."""
    from ..compile import compile
    from ..progress import shown

    check_curve(args)
    options = options_of(args)
    with shown() as report:
        result = compile(args.model, passes_of(args), args.out, options, report)
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
    print(f"wrote {result.path}")
