"""``qc show``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import Refused
from .options import check_place, state_options, state_plan


def add(commands: Any) -> None:
    """Declare the command."""
    what = "print a model as text, or draw it, as it is or as passes rewrite it"
    command = commands.add_parser("show", help=what, description=what)
    state_options(command, required=False)
    command.add_argument(
        "--after", metavar="PASS", help="as it is after this pass, or after step N of the plan"
    )
    command.add_argument("--layer", type=int, metavar="N", help="one block only")
    command.add_argument("--only", metavar="PATTERN", help="only what matches this pattern")
    command.add_argument(
        "--format", metavar="NAME", help="text, svg, html, mermaid, dot, png or model-explorer"
    )
    command.add_argument(
        "--out", metavar="FILE", type=Path, help="write it there; the suffix says the format"
    )
    command.add_argument("--every-op", action="store_true", help="draw a box for every row")
    command.add_argument(
        "--journal", metavar="OUT", type=Path, help="a finished compile, whose certificates are shown"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc show``: what was asked for, and a refusal behind it where the plan has problems."""
    from .. import registry
    from ..capture import capture
    from ..journal import entries_of
    from ..show.formats import FORMATS, View, format_of
    from ..show.states import State, state_after, steps_named
    from ..show.terminal import ROWS, show

    format = format_of(args.format, args.out)
    _check_asked(args, format)
    if args.only is not None:
        registry.get("patterns", args.only)
    plan = state_plan(args)
    if plan is None:
        state = State(capture(args.model, trust_remote_code=args.trust_remote_code))
    else:
        steps = range(len(plan.steps)) if args.after is None else steps_named(plan, args.after, "--after")
        state = state_after(plan, steps.stop)
    blocks = state.program.blocks
    if args.layer is not None and not 0 <= args.layer < len(blocks):
        raise Refused(f"--layer {args.layer}: the model has layers 0 to {len(blocks) - 1}")
    part = None if args.layer is None else blocks[args.layer]
    journal = entries_of(args.journal) if args.journal is not None else ()
    made = FORMATS[format](View(state, part, args.only, args.every_op, journal))
    if args.out is not None:
        args.out.write_bytes(made.encode() if isinstance(made, str) else made)
        print(f"wrote {args.out}")
    elif isinstance(made, bytes):
        if sys.stdout.isatty():
            raise Refused(f"--format {format} is no text: give --out FILE")
        sys.stdout.buffer.write(made)
    elif format == "text":
        show(made, ROWS)
    else:
        print(made, end="")
    if plan is not None:
        plan.require()


def _check_asked(args: argparse.Namespace, format: str) -> None:
    """Refuse what would be taken and not shown, before a model is read."""
    if args.out is not None:
        check_place("--out", args.out)
    if args.passes is None and args.config is None:
        for option, value in (("--after", args.after), ("--journal", args.journal)):
            if value is not None:
                raise Refused(f"{option} {value}: no passes were given: add --passes or --config")
    if args.journal is not None and format not in ("text", "html"):
        raise Refused(f"--journal {args.journal}: certificates are printed in text and html, not in {format}")
    if args.only is not None and format == "model-explorer":
        raise Refused(f"--only {args.only}: model-explorer takes whole graphs: take another --format")
    if args.every_op and args.layer is None and format in ("svg", "png", "mermaid", "dot"):
        raise Refused(
            f"--every-op: a {format} of the whole model has no box per op: add --layer, or take html"
        )
