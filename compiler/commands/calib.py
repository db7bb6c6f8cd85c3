"""``qc calib mix`` and ``qc calib refine``."""

from __future__ import annotations

import argparse
from typing import Any

from .options import options_of, passes_of, solve_options


def add(commands: Any) -> None:
    """Declare the command and what it has below it."""
    what = "make and mend calibration sets"
    command = commands.add_parser("calib", help=what, description=what)
    below = command.add_subparsers(dest="calib", required=True, metavar="mix|refine")
    _add_mix(below)
    _add_refine(below)


def _add_mix(commands: Any) -> None:
    what = "draw a mixed calibration set from data sets"
    command = commands.add_parser("mix", help=what, description=what)
    command.add_argument(
        "--config", required=True, metavar="FILE", help="JSON: names, paths and readers of data sets"
    )
    command.add_argument(
        "--size",
        action="append",
        required=True,
        metavar="NAME=N,...",
        help="questions of each set: boolq=4,gsm8k=3",
    )
    command.add_argument("--positive", metavar="MODEL", help="only questions that this model answers right")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawing (default 0)")
    command.add_argument("--out", required=True, metavar="FILE", help=".jsonl (or .json) to write")
    command.add_argument("--force", action="store_true", help="replace FILE when it exists")
    command.set_defaults(run=run_mix)


def _add_refine(commands: Any) -> None:
    what = "leave out samples that hurt, add bad cases"
    command = commands.add_parser("refine", help=what, description=what)
    solve_options(command, samples=64, counted="samples that are looked at")
    command.add_argument(
        "--add", action="append", default=[], nargs="+", metavar="FILE", help="bad cases to add to the set"
    )
    command.add_argument(
        "--judge", action="append", default=[], nargs="+", metavar="FILE",
        help="text to measure errors on (default: samples of the set, in turn)",
    )  # fmt: skip
    command.add_argument(
        "--worth", type=float, default=1.0, metavar="PERCENT",
        help="drop what costs at least so much of the block error (default 1)",
    )  # fmt: skip
    command.add_argument(
        "--most",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="drop at most so many of the samples (default 0.25)",
    )
    command.add_argument("--out", required=True, metavar="FILE", help=".jsonl (or .json) to write")
    command.add_argument("--force", action="store_true", help="replace FILE when it exists")
    command.set_defaults(run=run_refine)


def run_mix(args: argparse.Namespace) -> None:
    """``qc calib mix``."""
    from ..calib_mix import mix, parse_sizes
    from ..progress import shown
    from ..solve import Progress

    with shown() as report:
        made = mix(
            args.config, parse_sizes(args.size), args.out, positive=args.positive, seed=args.seed, force=args.force,
            report=lambda name, found, wanted: report(Progress(name, found, wanted, "questions answered right")),
        )  # fmt: skip
    for one in made.sets:
        print(one)
    count = len(made.samples)
    print(f"wrote {made.path}: {count} sample{'' if count == 1 else 's'}")


def run_refine(args: argparse.Namespace) -> None:
    """``qc calib refine``."""
    from ..calib_refine import refine
    from ..calib_report import report_text
    from ..progress import shown

    with shown() as report:
        found = refine(
            args.model, passes_of(args), args.out, options_of(args), worth=args.worth, most=args.most,
            add=[f for fs in args.add for f in fs], judge=[f for fs in args.judge for f in fs], report=report,
        )  # fmt: skip
    print(report_text(found))
