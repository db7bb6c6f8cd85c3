"""The options that commands share, and what the engine makes of them."""

from __future__ import annotations

import argparse
from typing import Any


def plan_options(command: argparse.ArgumentParser) -> None:
    """The options that ``compile`` and ``plan`` share."""
    command.add_argument("model", metavar="MODEL", help="checkpoint directory or hub id")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--passes", help='e.g. "iter_smooth{alpha=0.7},quarot,autoround" (quote it)')
    what.add_argument("--config", metavar="FILE", help="a recipe: YAML of apiversion modelslim_v1")
    command.add_argument("--scheme", help="number formats: auto, w8a8, w4a4, ... (default auto)")
    command.add_argument("--target", help="who loads the result (default the recipe's, else vllm-ascend)")
    command.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of the server (default 1)")
    command.add_argument(
        "--calib", action="append", default=[], nargs="+", metavar="FILE", help="calibration text"
    )
    command.add_argument("--samples", type=int, default=32, help="calibration windows (default 32)")
    command.add_argument("--length", type=int, default=512, help="tokens per window (default 512)")
    command.add_argument(
        "--calibrate-all-experts", action="store_true", help="let every expert see every calibration token"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cpu")
    command.add_argument("--dtype", default="auto", help="dtype of calibration runs: auto, bfloat16, float32")
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code of the checkpoint")


def state_options(command: argparse.ArgumentParser, *, required: bool) -> None:
    """The options of commands that look at the graph and at what passes make of it."""
    command.add_argument(
        "model", metavar="MODEL", help="checkpoint directory or hub id; a config.json is enough"
    )
    what = command.add_mutually_exclusive_group(required=required)
    what.add_argument("--passes", help="as these passes rewrite it (quote the list)")
    what.add_argument("--config", metavar="FILE", help="as the passes of this recipe rewrite it")
    command.add_argument("--scheme", help="number formats: auto, w8a8, w4a4, ... (default auto)")
    command.add_argument("--target", help="who loads the result (default the recipe's, else vllm-ascend)")
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
    )  # fmt: skip


def passes_of(args: argparse.Namespace) -> Any:
    """What ``--passes`` says, or the recipe of ``--config``."""
    from ..recipe import read_recipe

    return read_recipe(args.config) if args.config is not None else args.passes
