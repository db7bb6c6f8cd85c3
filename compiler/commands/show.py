"""``qc show``."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import Refused


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser("show", help="print the canonical text of a model")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--passes", help="print it as these passes rewrite it")
    command.add_argument("--layer", type=int, help="one block only")
    command.add_argument("--scheme", default="auto")
    command.add_argument("--target", default="vllm-ascend")
    command.add_argument("--trust-remote-code", action="store_true")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc show``."""
    from ..capture import capture
    from ..plan import make_plan
    from ..show.text import text

    program = capture(args.model, trust_remote_code=args.trust_remote_code)
    if args.passes:
        program = make_plan(program, args.passes, scheme=args.scheme, target=args.target).require().final
    if args.layer is not None and not 0 <= args.layer < len(program.blocks):
        raise Refused(f"--layer {args.layer}: the model has layers 0 to {len(program.blocks) - 1}")
    print(text(program, layer=args.layer), end="")
