"""``qc bisect``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .options import options_of, passes_of, solve_options


def add(commands: Any) -> None:
    """Declare the command."""
    what = "say which pass of a plan hurts what the model says, and at which places"
    command = commands.add_parser("bisect", help=what, description=what)
    solve_options(command)
    command.add_argument(
        "--max-kl", dest="limit", type=float, metavar="K",
        help="the first step past K nats per token of divergence from the float model (default: the step that"
        " adds most)",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print all numbers as one JSON object")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc bisect``."""
    from ..bisect import bisect
    from ..bisect_text import bisect_json, bisect_text
    from ..progress import shown

    options = options_of(args)
    with shown() as report:
        found = bisect(args.model, passes_of(args), options, max_kl=args.limit, report=report)
    print(json.dumps(bisect_json(found), indent=2) if args.json else bisect_text(found))
