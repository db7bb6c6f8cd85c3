"""``qc generate``."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    what = "let an exported checkpoint answer"
    command = commands.add_parser("generate", help=what, description=what)
    command.add_argument("out", metavar="OUT", help="checkpoint directory, quantized or float")
    command.add_argument("prompt", metavar="PROMPT", help="what is said to it (quote it)")
    command.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default 64)"
    )
    command.add_argument(
        "--phase", choices=("served", "prefill", "decode"), default="served",
        help="arithmetic of linears that have two: served decodes behind the prompt (default served)",
    )  # fmt: skip
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc generate``."""
    from ..generate import generate

    print(generate(args.out, args.prompt, max_new_tokens=args.max_new_tokens, phase=args.phase))
