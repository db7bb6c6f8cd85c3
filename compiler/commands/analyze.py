"""``qc analyze``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .options import check_drawing


def add(commands: Any) -> None:
    """Declare the command."""
    what = "say which linears, layers or attentions are most sensitive"
    command = commands.add_parser("analyze", help=what, description=what)
    command.add_argument("model", metavar="MODEL", help="checkpoint directory or hub id")
    command.add_argument(
        "--metric",
        metavar="NAME",
        help="kurtosis, std, quantile, mse or kl (default kurtosis; of attentions mse)",
    )
    command.add_argument(
        "--by", default="linear", metavar="KIND", help="linear, layer or attention (default linear)"
    )
    command.add_argument(
        "--scheme", default="w8a8", metavar="NAME", help="formats that mse and kl round to (default w8a8)"
    )
    command.add_argument(
        "--top", type=int, default=15, metavar="N", help="how many to leave out (default 15)"
    )
    command.add_argument(
        "--calib", action="append", default=[], nargs="+", metavar="FILE", help="calibration text"
    )
    command.add_argument(
        "--samples", type=int, default=32, metavar="N", help="calibration windows (default 32)"
    )
    command.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens per window (default 512)"
    )
    command.add_argument("--plot", metavar="FILE", help="draw the scores as bars (.svg)")
    command.add_argument(
        "--dtype", default="auto", metavar="NAME", help="dtype of the run: auto, bfloat16, float32"
    )
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code of the checkpoint")
    command.add_argument(
        "--json", action="store_true", help="for machines: all scores and the list to exclude"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc analyze``."""
    import dataclasses

    from ..analyze import analyze, report_svg, report_text
    from ..compile import Options
    from ..progress import shown

    if args.plot is not None:
        check_drawing("--plot", args.plot)
    options = Options(
        calib=tuple(f for fs in args.calib for f in fs), samples=args.samples, length=args.length,
        dtype=args.dtype, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    with shown() as report:
        found = analyze(
            args.model,
            options,
            metric=args.metric,
            by=args.by,
            scheme=args.scheme,
            top=args.top,
            report=report,
        )
    if args.plot is not None:
        Path(args.plot).write_text(report_svg(found), encoding="utf-8")
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        print(report_text(found))
