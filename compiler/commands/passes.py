"""``qc passes``."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    what = "list the passes, or say everything about one"
    command = commands.add_parser("passes", help=what, description=what)
    command.add_argument("name", metavar="NAME", nargs="?", help="one of them")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc passes``."""
    import dataclasses

    from .. import registry
    from ..about import about, about_text, passes_text

    if args.json:
        known = (
            [args.name]
            if args.name
            else [name for g in ("passes", "presets") for name, _ in registry.each(g)]
        )
        print(json.dumps([dataclasses.asdict(about(name)) for name in known], indent=2))
    else:
        print(about_text(about(args.name)) if args.name else passes_text())
