"""``qc why``."""

from __future__ import annotations

import argparse
import difflib
from typing import Any

from ..errors import Refused


def add(commands: Any) -> None:
    """Declare the command."""
    what = "say where a pattern matches, and why it does not elsewhere"
    command = commands.add_parser("why", help=what, description=what)
    command.add_argument(
        "model", metavar="MODEL", help="checkpoint directory or hub id; a config.json is enough"
    )
    command.add_argument("pattern", metavar="PATTERN", help="such as ov or norm_linear")
    command.add_argument("--at", metavar="MODULE", help="module below which to look, e.g. model.layers.3.mlp")
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code of the checkpoint")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc why``."""
    from .. import registry
    from ..capture import capture
    from ..show.text import around

    pattern = registry.get("patterns", args.pattern)
    program = capture(args.model, trust_remote_code=args.trust_remote_code)
    modules = [name for name, _ in program.root.named_modules()]
    if args.at is not None and not any(args.at in name for name in modules):
        close = difflib.get_close_matches(args.at, modules, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise Refused(f"--at {args.at}: no module of the model has that in its name{hint}")
    below = [match for match in pattern.find(program) if args.at is None or args.at in str(match)]
    for match in below:
        print(f"matches: {fields(match)}")
    miss = pattern.nearest(program, args.at)
    if miss is not None:
        print(f"nearest miss at {miss.at}: {miss.reason}")
        if miss.node is not None:
            print(around(program, miss.node))
    elif not below:
        print("nothing there looks like it: no attempt got as far as a reason")


def fields(match: Any) -> str:
    """The fields of a match in one line: ``up=..., gate=..., down=...``; several modules are joined by ``+``."""
    import dataclasses

    def shown(value: Any) -> str:
        return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return ", ".join(f"{f.name}={shown(getattr(match, f.name))}" for f in dataclasses.fields(match))
