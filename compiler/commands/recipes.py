"""``qc recipes``."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    what = "list the named plans and what they reached, or tell one of them"
    command = commands.add_parser("recipes", help=what, description=what)
    command.add_argument("name", metavar="NAME", nargs="?", help="one of them")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc recipes``."""
    from ..named import recipes_text

    print(recipes_text(args.name))
