"""``qc plan``."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from typing import Any

from ..errors import Refused
from .options import check_curve, options_of, passes_of, plan_options, show_choice


def add(commands: Any) -> None:
    """Declare the command."""
    what = "say what a compile would do, before any weight is read"
    command = commands.add_parser("plan", help=what, description=what)
    plan_options(command)
    printed = command.add_mutually_exclusive_group()
    printed.add_argument(
        "--yaml", action="store_true", help="print the plan as a recipe file that --config reads"
    )
    printed.add_argument(
        "--json",
        action="store_true",
        help="print the plan as one JSON object, whatever "
        "the exit status; its problems are listed under 'problems'",
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``qc plan``: 0 for a plan that can be done, 2 for one with problems, which are part of it.

    With ``--json`` stdout is one JSON object in both cases. Where there is no plan at all (no such model, an unknown
    pass) it is ``{"problems": [why]}``, and the reason stands on stderr too.
    """
    from ..compile import plan
    from ..plan_text import plan_json, plan_text
    from ..progress import shown
    from ..recipe_yaml import recipe_yaml

    try:
        check_curve(args)
        options = options_of(args)
        with shown() if options.chooses else nullcontext(lambda progress: None) as report:
            planned = plan(args.model, passes_of(args), options, report)
    except Refused as error:
        if args.json:
            print(json.dumps({"problems": [str(error)]}, indent=2))
        raise
    show_choice(args, planned)
    if args.yaml:
        print(recipe_yaml(planned.require()), end="")
        return 0
    if args.json:
        print(json.dumps(plan_json(planned), indent=2))
    else:
        print(plan_text(planned), end="")
    return 2 if planned.problems else 0
