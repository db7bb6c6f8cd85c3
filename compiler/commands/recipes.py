"""``qc recipes``."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser("recipes", help="list the named plans and what they reached")
    command.add_argument("name", metavar="NAME", nargs="?", help="one of them")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc recipes``."""
    from ..named import recipes_text

    print(recipes_text(args.name))
