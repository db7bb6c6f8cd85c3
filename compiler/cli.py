"""The command line: what every command shares. A command is a file of ``compiler/commands/``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from .commands import NAMES
from .errors import Failed, Refused


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 1 failed while working, 2 refused, 130 interrupted."""
    # Read by OpenMP when torch is imported: threads that spin while they wait cost others, and us, far more.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = make_parser()
    args, words = parser.parse_known_args(argv)
    try:
        check_words(parser, args, words)
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except Refused as error:
        print(f"qc: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"qc: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # what Python flushes at its end must not meet it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"qc: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qc: interrupted; nothing was written", file=sys.stderr)
        return 130


def check_words(parser: argparse.ArgumentParser, args: argparse.Namespace, words: Sequence[str]) -> None:
    """Refuse words that no option takes, and say so when a shell made them by expanding braces."""
    if any(word.startswith("-") for word in words):
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    if not words:
        return
    if any("=" in word for word in (*words, str(getattr(args, "model", "")))):
        raise Refused(
            f"unexpected words {' '.join(words)}: the shell has expanded the braces of --passes. "
            'Quote the list: --passes "iter_smooth{alpha=0.7, scale_min=1e-4},quarot"'
        )
    raise Refused(f"unexpected words: {' '.join(words)}")


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="qc", description="A quantization compiler for large language models."
    )
    parser.add_argument("--version", action="version", version=f"qc {version('qc')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in NAMES:
        import_module(f".commands.{name}", __package__).add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
