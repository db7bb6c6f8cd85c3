"""The command line: ``qc compile``, ``plan``, ``show``, ``why``, ``eval``, ``verify``, ``generate``."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

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
    for name, run, help_text in (
        ("compile", run_compile, "compile a model into a quantized checkpoint"),
        ("plan", run_plan, "say what a compile would do, before any weight is read"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text)
        plan_options(command)
        command.set_defaults(run=run)
        if name == "compile":
            command.add_argument("--out", required=True, help="directory to make")
            command.add_argument(
                "--fallback", default="L0", metavar="LK",
                help="leave the K most sensitive places float, found on the calibration data (L5)",
            )  # fmt: skip
            command.add_argument("--force", action="store_true", help="replace OUT when it exists")
        else:
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
    show = commands.add_parser("show", help="print the canonical text of a model")
    show.add_argument("model", metavar="MODEL")
    show.add_argument("--passes", help="print it as these passes rewrite it")
    show.add_argument("--layer", type=int, help="one block only")
    show.add_argument("--scheme", default="auto")
    show.add_argument("--target", default="vllm-ascend")
    show.add_argument("--trust-remote-code", action="store_true")
    show.set_defaults(run=run_show)
    why = commands.add_parser("why", help="say why a pattern does not match somewhere")
    why.add_argument("model", metavar="MODEL")
    why.add_argument("pattern", metavar="PATTERN")
    why.add_argument("--at", help="module below which to look, e.g. model.layers.3.mlp")
    why.add_argument("--trust-remote-code", action="store_true")
    why.set_defaults(run=run_why)
    evaluate = commands.add_parser(
        "eval", help="compare an exported checkpoint with its float reference on a text"
    )
    evaluate.add_argument("out", metavar="OUT")
    evaluate.add_argument("--reference", required=True, help="the float checkpoint")
    evaluate.add_argument("--text", required=True, help="text file")
    evaluate.add_argument("--windows", type=int, default=40)
    evaluate.add_argument("--length", type=int, default=512)
    evaluate.add_argument("--json", action="store_true", help="for machines")
    evaluate.set_defaults(run=run_eval)
    verify = commands.add_parser("verify", help="check an exported checkpoint against what it says of itself")
    verify.add_argument("out", metavar="OUT")
    verify.add_argument("--model", help="the checkpoint that it was made from: compare that one too")
    verify.add_argument("--json", action="store_true", help="for machines")
    verify.set_defaults(run=run_verify)
    analyze = commands.add_parser(
        "analyze", help="say which linears, layers or attentions are most sensitive"
    )
    analyze.add_argument("model", metavar="MODEL", help="checkpoint directory or hub id")
    analyze.add_argument(
        "--metric", help="kurtosis, std, quantile or mse (default kurtosis; of attentions mse)"
    )
    analyze.add_argument("--by", default="linear", help="linear, layer or attention (default linear)")
    analyze.add_argument("--scheme", default="w8a8", help="formats that mse rounds to (default w8a8)")
    analyze.add_argument("--top", type=int, default=15, help="how many to leave out (default 15)")
    analyze.add_argument(
        "--calib", action="append", default=[], nargs="+", metavar="FILE", help="calibration text"
    )
    analyze.add_argument("--samples", type=int, default=32, help="calibration windows (default 32)")
    analyze.add_argument("--length", type=int, default=512, help="tokens per window (default 512)")
    analyze.add_argument("--dtype", default="auto", help="dtype of the run: auto, bfloat16, float32")
    analyze.add_argument("--trust-remote-code", action="store_true", help="run Python code of the checkpoint")
    analyze.add_argument(
        "--json", action="store_true", help="for machines: all scores and the list to exclude"
    )
    analyze.set_defaults(run=run_analyze)
    recipes = commands.add_parser("recipes", help="list the named plans and what they reached")
    recipes.add_argument("name", metavar="NAME", nargs="?", help="one of them")
    recipes.set_defaults(run=run_recipes)
    generate = commands.add_parser("generate", help="let an exported checkpoint answer")
    generate.add_argument("out", metavar="OUT")
    generate.add_argument("prompt")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.set_defaults(run=run_generate)
    return parser


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


def options_of(args: argparse.Namespace) -> Any:
    """The engine's options from parsed arguments."""
    from .compile import Options

    return Options(
        fallback=getattr(args, "fallback", "L0"),
        scheme=args.scheme, target=args.target, tp=args.tp, calib=tuple(f for fs in args.calib for f in fs),
        samples=args.samples, length=args.length, seed=args.seed, device=args.device, dtype=args.dtype,
        trust_remote_code=args.trust_remote_code, force=getattr(args, "force", False),
        calibrate_all_experts=args.calibrate_all_experts,
    )  # fmt: skip


def passes_of(args: argparse.Namespace) -> Any:
    """What ``--passes`` says, or the recipe of ``--config``."""
    from .recipe import read_recipe

    return read_recipe(args.config) if args.config is not None else args.passes


def run_compile(args: argparse.Namespace) -> None:
    """``qc compile``."""
    from .compile import compile
    from .progress import shown

    options = options_of(args)
    with shown() as report:
        result = compile(args.model, passes_of(args), args.out, options, report)
    journal = result.journal
    data = result.calibration
    if data is not None:
        fewer = f", fewer than the {options.samples} asked for" if len(data.tokens) < options.samples else ""
        print(f"calibrated on {data}{fewer}")
    if journal.idle_experts:
        first, count = journal.idle_experts[0], len(journal.idle_experts)
        print(
            f"{count} experts saw no calibration token, {first} first: their activation statistics are those of the"
            " other experts of the layer, their weights are rounded to nearest. More --samples, or"
            " --calibrate-all-experts"
        )
    for line in journal.passes(result.plan.rewrites):
        print(line)
    print(f"wrote {result.path}")


def run_analyze(args: argparse.Namespace) -> None:
    """``qc analyze``."""
    import dataclasses

    from .analyze import analyze, report_text
    from .compile import Options
    from .progress import shown

    options = Options(
        calib=tuple(f for fs in args.calib for f in fs), samples=args.samples, length=args.length,
        dtype=args.dtype, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    with shown() as report:
        found = analyze(
            args.model,
            options,
            metric=args.metric,
            by=args.by,
            scheme=args.scheme,
            top=args.top,
            report=report,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        print(report_text(found))


def run_recipes(args: argparse.Namespace) -> None:
    """``qc recipes``."""
    from .named import recipes_text

    print(recipes_text(args.name))


def run_plan(args: argparse.Namespace) -> int:
    """``qc plan``: 0 for a plan that can be done, 2 for one with problems, which are part of it.

    With ``--json`` stdout is one JSON object in both cases. Where there is no plan at all (no such model, an unknown
    pass) it is ``{"problems": [why]}``, and the reason stands on stderr too.
    """
    from .compile import plan
    from .plan_text import plan_json, plan_text
    from .recipe_yaml import recipe_yaml

    try:
        planned = plan(args.model, passes_of(args), options_of(args))
    except Refused as error:
        if args.json:
            print(json.dumps({"problems": [str(error)]}, indent=2))
        raise
    if args.yaml:
        print(recipe_yaml(planned.require()), end="")
        return 0
    if args.json:
        print(json.dumps(plan_json(planned), indent=2))
    else:
        print(plan_text(planned), end="")
    return 2 if planned.problems else 0


def run_show(args: argparse.Namespace) -> None:
    """``qc show``."""
    from .capture import capture
    from .plan import make_plan
    from .show.text import text

    program = capture(args.model, trust_remote_code=args.trust_remote_code)
    if args.passes:
        program = make_plan(program, args.passes, scheme=args.scheme, target=args.target).require().final
    if args.layer is not None and not 0 <= args.layer < len(program.blocks):
        raise Refused(f"--layer {args.layer}: the model has layers 0 to {len(program.blocks) - 1}")
    print(text(program, layer=args.layer), end="")


def run_why(args: argparse.Namespace) -> None:
    """``qc why``."""
    from . import registry
    from .capture import capture
    from .show.text import around

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


def run_eval(args: argparse.Namespace) -> None:
    """``qc eval``."""
    import dataclasses

    from .evaluate import evaluate, format

    found = evaluate(args.out, args.reference, args.text, windows=args.windows, length=args.length)
    if args.json:
        more = {
            "perplexity": found.perplexity,
            "reference_perplexity": found.reference_perplexity,
            "ratio": found.ratio,
        }
        print(json.dumps({**dataclasses.asdict(found), **more}))
    else:
        print(format(found))


def run_verify(args: argparse.Namespace) -> int:
    """``qc verify``: 0 where everything is as it was written, 1 where something is wrong."""
    import dataclasses

    from .verify import verify

    checks = verify(args.out, args.model)
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        print(*checks, sep="\n")
    return 1 if any(check.wrong for check in checks) else 0


def run_generate(args: argparse.Namespace) -> None:
    """``qc generate``."""
    from .generate import generate

    print(generate(args.out, args.prompt, max_new_tokens=args.max_new_tokens))


if __name__ == "__main__":
    sys.exit(main())
