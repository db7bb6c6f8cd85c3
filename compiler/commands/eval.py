"""``qc eval``."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "eval", help="compare an exported checkpoint with its float reference on a text"
    )
    command.add_argument("out", metavar="OUT")
    command.add_argument("--reference", required=True, help="the float checkpoint")
    command.add_argument("--text", required=True, help="text file")
    command.add_argument("--windows", type=int, default=40)
    command.add_argument("--length", type=int, default=512)
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc eval``."""
    import dataclasses

    from ..evaluate import evaluate, format

    found = evaluate(args.out, args.reference, args.text, windows=args.windows, length=args.length)
    if args.json:
        more = {
            "perplexity": found.perplexity,
            "reference_perplexity": found.reference_perplexity,
            "ratio": found.ratio,
        }
        print(json.dumps({**dataclasses.asdict(found), **more}))
    else:
        print(format(found))
