"""``qc new-pass``."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    what = "make a package for a pass of your own"
    command = commands.add_parser("new-pass", help=what, description=what)
    command.add_argument("name", metavar="NAME", help="of the pass, such as even_columns")
    command.add_argument("--out", metavar="DIR", help="directory to make (default qc-NAME)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc new-pass``."""
    from ..new_pass import new_pass

    out = new_pass(args.name, args.out)
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        print(file)
    print(f'next: pip install -e "{out}[test]", then pytest {out} and qc passes {args.name}')
