"""``qc reproduce``."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser("reproduce", help="run a failed proof again, alone")
    command.add_argument("file", metavar="FILE", help="what the compile wrote beside OUT")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``qc reproduce``: 0 where the rewrite now keeps the function, 1 where it does not."""
    from ..certificate import LIMIT
    from ..reproducer import reproduce

    found = reproduce(args.file)
    print(found)
    return 0 if found.math < LIMIT else 1
