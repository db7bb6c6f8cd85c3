"""``qc eval``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .options import check_drawing


def add(commands: Any) -> None:
    """Declare the command."""
    what = "compare an exported checkpoint with its float reference, on a text or on tasks"
    command = commands.add_parser("eval", help=what, description=what)
    command.add_argument("out", metavar="OUT", help="checkpoint directory, quantized or float")
    command.add_argument("--reference", metavar="MODEL", help="the float checkpoint")
    command.add_argument("--text", metavar="FILE", help="text: perplexity, divergence, agreement")
    command.add_argument("--windows", type=int, default=40, metavar="N", help="windows of text (default 40)")
    command.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens per window (default 512)"
    )
    command.add_argument("--by", choices=("layer",), help="the error of every layer on the text, as a table")
    command.add_argument("--plot", metavar="FILE", help="with --by layer: the same as a picture (.svg)")
    command.add_argument("--tasks", metavar="LIST", help="tasks of lm-eval, joined by commas")
    command.add_argument(
        "--include", action="append", default=[], metavar="DIR", help="directory with task files of your own"
    )
    command.add_argument("--limit", type=int, metavar="N", help="documents per task (default all)")
    command.add_argument(
        "--shots", type=int, metavar="N", help="examples before each (default what the task says)"
    )
    command.add_argument(
        "--batch", type=int, default=1, metavar="N", help="sequences of a task that run at once (default 1)"
    )
    command.add_argument(
        "--phase", choices=("prefill", "decode"), help="arithmetic of linears that have two (default prefill)"
    )
    command.add_argument("--card", action="store_true", help="write the result into the model card of OUT")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``qc eval``."""
    from ..evaluate import check_asked

    check_asked(
        text=args.text, tasks=args.tasks, reference=args.reference, by=args.by, plot=args.plot,
        limit=args.limit, batch=args.batch,
    )  # fmt: skip
    if args.plot is not None:
        check_drawing("--plot", args.plot)
    if args.card:
        from ..model_card import check_card

        check_card(args.out)
    parts = [part(args) for part, asked in ((on_text, args.text), (on_tasks, args.tasks)) if asked]
    if args.card:
        from ..model_card import write_accuracy

        write_accuracy(args.out, "\n\n".join(f"```\n{text}\n```\n\n{how}" for text, how, _ in parts))
    if args.json:
        print(json.dumps({key: value for *_, found in parts for key, value in found.items()}))
    else:
        print("\n\n".join(text for text, *_ in parts))


def on_text(args: argparse.Namespace) -> tuple[str, str, dict[str, Any]]:
    """Perplexity and divergence, and the errors of layers: as text, how it was asked for, and for machines."""
    import dataclasses

    from ..calibration import windows_of
    from ..evaluate import format, measure
    from ..layer_error import table
    from ..layer_plot import save_plot

    found, errors = measure(
        args.out,
        args.reference,
        args.text,
        windows=args.windows,
        length=args.length,
        by=args.by,
        phase=args.phase,
    )
    shown = format(found) + (f"\n\n{table(errors)}" if errors else "")
    if args.plot:
        save_plot(errors, f"{args.out}: error by layer, {windows_of(found.windows, found.length)}", args.plot)
    numbers = dataclasses.asdict(found) | {
        "perplexity": found.perplexity, "reference_perplexity": found.reference_perplexity, "ratio": found.ratio,
    }  # fmt: skip
    if errors:
        numbers["layers"] = [dataclasses.asdict(error) for error in errors]
    phase = f" --phase {args.phase}" if args.phase else ""
    name = args.text.replace("\\", "/").rpartition("/")[2]
    how = f"`qc eval OUT --reference MODEL --text {name} --windows {args.windows} --length {args.length}{phase}`"
    return shown, how, numbers


def on_tasks(args: argparse.Namespace) -> tuple[str, str, dict[str, Any]]:
    """The scores of tasks: as text, how they were asked for, and for machines."""
    import dataclasses

    from ..evaluate import prepared
    from ..load import load, load_tokenizer
    from ..tasks import run_tasks, table, task_names

    names, manager = task_names(args.tasks, args.include)
    scores = []
    for path in (args.out, args.reference):
        if path is None:
            scores.append(())
            continue
        model = prepared(path, load(path), args.phase) if path == args.out else load(path)
        scores.append(
            run_tasks(
                model,
                load_tokenizer(path),
                names,
                manager,
                limit=args.limit,
                shots=args.shots,
                batch=args.batch,
            )
        )
        del model
    keys = ("tasks", "reference_tasks")
    numbers = {key: [dataclasses.asdict(s) for s in of] for key, of in zip(keys, scores, strict=True) if of}
    return table(*scores), tasks_asked(args), numbers


def tasks_asked(args: argparse.Namespace) -> str:
    """The command that repeats the tasks, as the model card prints it."""
    asked = {"limit": args.limit, "shots": args.shots, "phase": args.phase}
    told = "".join(f" --{key} {value}" for key, value in asked.items() if value is not None)
    return f"`qc eval OUT --tasks {args.tasks}{told}`"
