"""``qc verify``."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "verify", help="check an exported checkpoint against what it says of itself"
    )
    command.add_argument("out", metavar="OUT")
    command.add_argument("--model", help="the checkpoint that it was made from: compare that one too")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``qc verify``: 0 where everything is as it was written, 1 where something is wrong."""
    import dataclasses

    from ..verify import verify

    checks = verify(args.out, args.model)
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        print(*checks, sep="\n")
    return 1 if any(check.wrong for check in checks) else 0
