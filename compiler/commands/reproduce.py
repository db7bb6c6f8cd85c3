"""``qc reproduce``."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    what = "run a failed proof again, alone"
    command = commands.add_parser("reproduce", help=what, description=what)
    command.add_argument("file", metavar="FILE", help="what the compile wrote beside OUT")
    command.add_argument(
        "--model", metavar="MODEL", help="the checkpoint, in place of the path that the file names"
    )
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code of the checkpoint")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``qc reproduce``: 0 where the rewrite now keeps the function, 1 where it does not."""
    from ..certificate import LIMIT
    from ..reproducer import reproduce

    found = reproduce(args.file, model=args.model, trust_remote_code=args.trust_remote_code)
    print(found)
    return 0 if found.math < LIMIT else 1
