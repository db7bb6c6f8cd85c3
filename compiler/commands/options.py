"""The options that commands share, and what the engine makes of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import Refused


def plan_options(command: argparse.ArgumentParser) -> None:
    """The options that ``compile`` and ``plan`` share."""
    solve_options(command)
    choosing_options(command)
    command.add_argument(
        "--print-after", action="append", default=[], metavar="PASS",
        help="print the program as it is after this step (a name, a number, or all)",
    )  # fmt: skip


def choosing_options(command: argparse.ArgumentParser) -> None:
    """The options that have formats chosen."""
    budget = command.add_mutually_exclusive_group()
    budget.add_argument(
        "--avg-bits", type=float, metavar="B",
        help="choose the formats: least divergence within B bits per weight, scales counted",
    )  # fmt: skip
    budget.add_argument(
        "--max-kl", type=float, metavar="K",
        help="choose the formats: fewest bits within K nats per token of divergence from the float model",
    )  # fmt: skip
    command.add_argument(
        "--choose-from",
        metavar="SCHEMES",
        help="what --avg-bits and --max-kl choose among (w4a4,w4a8,w8a8,float)",
    )
    command.add_argument(
        "--curve", metavar="FILE", help="draw the trade-off of --avg-bits or --max-kl (.svg)"
    )


def solve_options(
    command: argparse.ArgumentParser, samples: int = 32, counted: str = "calibration windows"
) -> None:
    """The options of whatever solves a plan; ``--samples`` counts what a command says."""
    command.add_argument("model", metavar="MODEL", help="checkpoint directory or hub id")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--passes", metavar="LIST", help='e.g. "iter_smooth{alpha=0.7},quarot,autoround" (quote it)'
    )
    what.add_argument("--config", metavar="FILE", help="a recipe: YAML of apiversion modelslim_v1")
    command.add_argument(
        "--scheme", metavar="NAME", help="number formats: auto, w8a8, w4a4, ... (default auto)"
    )
    command.add_argument(
        "--target", metavar="NAME", help="who loads the result (default the recipe's, else vllm-ascend)"
    )
    command.add_argument(
        "--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks of the server (default 1)"
    )
    command.add_argument(
        "--calib", action="append", default=[], nargs="+", metavar="FILE", help="calibration text"
    )
    command.add_argument(
        "--samples", type=int, default=samples, metavar="N", help=f"{counted} (default {samples})"
    )
    command.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens per window (default 512)"
    )
    command.add_argument(
        "--calibrate-all-experts", action="store_true", help="let every expert see every calibration token"
    )
    command.add_argument(
        "--max-memory", metavar="SIZE",
        help="most memory, such as cpu=8GiB,cuda:0=4GiB: work is cut into pieces, or the plan says what is too large",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")
    command.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="where blocks run: cpu, cuda:0, npu:0, mps, ... (default cpu)",
    )
    command.add_argument(
        "--dtype", default="auto", metavar="NAME", help="dtype of calibration runs: auto, bfloat16, float32"
    )
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code of the checkpoint")


def state_options(command: argparse.ArgumentParser, *, required: bool) -> None:
    """The options of commands that look at the graph and at what passes make of it."""
    command.add_argument(
        "model", metavar="MODEL", help="checkpoint directory or hub id; a config.json is enough"
    )
    what = command.add_mutually_exclusive_group(required=required)
    what.add_argument("--passes", metavar="LIST", help="as these passes rewrite it (quote the list)")
    what.add_argument("--config", metavar="FILE", help="as the passes of this recipe rewrite it")
    command.add_argument(
        "--scheme", metavar="NAME", help="number formats: auto, w8a8, w4a4, ... (default auto)"
    )
    command.add_argument(
        "--target", metavar="NAME", help="who loads the result (default the recipe's, else vllm-ascend)"
    )
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code of the checkpoint")


def state_plan(args: argparse.Namespace) -> Any:
    """The plan of the passes or of the recipe; None where neither was given."""
    from ..compile import Options, plan

    if args.passes is None and args.config is None:
        return None
    options = Options(scheme=args.scheme, target=args.target, trust_remote_code=args.trust_remote_code)
    return plan(args.model, passes_of(args), options)


def options_of(args: argparse.Namespace) -> Any:
    """The engine's options from parsed arguments."""
    from ..compile import Options

    return Options(
        fallback=getattr(args, "fallback", "L0"),
        scheme=args.scheme, target=args.target, tp=args.tp, calib=tuple(f for fs in args.calib for f in fs),
        samples=args.samples, length=args.length, seed=args.seed, device=args.device, dtype=args.dtype,
        trust_remote_code=args.trust_remote_code, force=getattr(args, "force", False),
        calibrate_all_experts=args.calibrate_all_experts, timings=getattr(args, "timings", False),
        max_memory=args.max_memory, avg_bits=getattr(args, "avg_bits", None), max_kl=getattr(args, "max_kl", None),
        choose_from=getattr(args, "choose_from", None),
    )  # fmt: skip


def print_after(args: argparse.Namespace, plan: Any) -> None:
    """Print the text of the program after every step that ``--print-after`` asks for, in the order of the plan."""
    from ..show.text import text
    from ..steps import after, steps_named

    for index in steps_named(plan, args.print_after):
        print(f"after {index + 1}. {plan.steps[index].what}")
        print(text(after(plan, index)))


def check_curve(args: argparse.Namespace) -> None:
    """Refused for a chart of nothing, or one that cannot be written."""
    if args.curve is None:
        return
    if args.avg_bits is None and args.max_kl is None:
        raise Refused("--curve draws what --avg-bits or --max-kl choose from: give one of them")
    check_drawing("--curve", args.curve)


def check_drawing(option: str, file: str) -> None:
    """Refused for a file that no chart can be written to."""
    if not file.endswith(".svg"):
        raise Refused(f"{option} {file}: charts are SVG; give a name that ends in .svg")
    check_place(option, file)


def check_place(option: str, file: str | Path) -> None:
    """Refused for a file that nothing can be written to: its directory is not there, or it is one itself."""
    if not Path(file).resolve().parent.is_dir():
        raise Refused(f"{option} {file}: its directory does not exist: make it first")
    if Path(file).is_dir():
        raise Refused(f"{option} {file}: this is a directory: give the name of a file")


def show_choice(args: argparse.Namespace, planned: Any) -> None:
    """Print how formats were chosen, and draw it where asked."""
    from ..choice_text import choice_svg, choice_text

    if planned.choice is None:
        return
    if args.curve is not None:
        Path(args.curve).write_text(choice_svg(planned.choice), encoding="utf-8")
    if not (getattr(args, "json", False) or getattr(args, "yaml", False)):
        print(choice_text(planned.choice))


def passes_of(args: argparse.Namespace) -> Any:
    """What ``--passes`` says, or the recipe of ``--config``."""
    from ..recipe import read_recipe

    return read_recipe(args.config) if args.config is not None else args.passes
