"""``qc verify``."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    what = "check a checkpoint against what it says of itself, or against who shall load it"
    command = commands.add_parser("verify", help=what, description=what)
    command.add_argument(
        "out", metavar="DIR", help="what qc compile wrote; with --target any checkpoint directory"
    )
    command.add_argument(
        "--model", metavar="MODEL", help="the checkpoint that it was made from: compare that one too"
    )
    command.add_argument(
        "--target",
        metavar="NAME",
        help="say whether this target loads DIR, refuses it or silently ruins it: vllm-ascend==0.18",
    )
    command.add_argument(
        "--tp", type=int, metavar="N", help="with --target: tensor-parallel ranks of the server (default 1)"
    )
    command.add_argument(
        "--trust-remote-code", action="store_true", help="with --target: run Python code of the checkpoint"
    )
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``qc verify``: 0 where everything is right, 1 where something is wrong."""
    return _run_verdict(args) if args.target is not None else _run_checks(args)


def _run_checks(args: argparse.Namespace) -> int:
    """Against what it says of itself."""
    import dataclasses

    from ..errors import Refused
    from ..verify import verify

    if args.tp is not None or args.trust_remote_code:
        raise Refused(
            "--tp and --trust-remote-code are for --target: name who shall load it, or leave them out"
        )
    checks = verify(args.out, args.model)
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        print(*checks, sep="\n")
    return 1 if any(check.wrong for check in checks) else 0


def _run_verdict(args: argparse.Namespace) -> int:
    """Against who shall load it."""
    from ..errors import Refused
    from ..targets.verdict import verdict

    if args.model is not None:
        raise Refused(
            "--model compares with what the checkpoint was made from, --target with who loads it: give one"
        )
    found = verdict(args.out, args.target, 1 if args.tp is None else args.tp, args.trust_remote_code)
    print(json.dumps(found.plain(), indent=2) if args.json else found)
    return 0 if found.word == "loads" else 1
