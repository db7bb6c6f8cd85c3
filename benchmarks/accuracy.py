"""Quality of compiled checkpoints: SmolLM2-135M against its float self.

``python -m benchmarks.accuracy [ROW ...]`` compiles the rows (default: those that have a bar) with the
command line and evaluates what was written, from its files alone, on 40 windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qc.compiler.evaluate import Evaluation, evaluate

from .measure import Measured, run_qc
from .records import Row, record, table
from .smollm2 import smollm2
from .texts import Texts, find_texts

SAMPLES, LENGTH, WINDOWS = 32, 512, 40


@dataclass(frozen=True)
class Recipe:
    """One row: what is compiled, and the bar on its perplexity as a multiple of the float model's."""

    passes: str
    scheme: str
    bar: float | None = None
    target: str = "vllm-ascend"
    kl_of: tuple[str, float] | None = None
    """Another row, and the share of its divergence that this one may have."""


RECIPES = {
    "w8a8": Recipe("iter_smooth,linear_quant", "w8a8", 1.02, kl_of=("rtn-w8a8", 0.75)),
    "auto": Recipe("iter_smooth,quarot,autoround", "auto", 1.45),
    "w4a4": Recipe("iter_smooth,quarot,online_rotation,autoround", "w4a4", 1.9),
    "w4a16-g64": Recipe("autoround{iters=50}", "w4a16-g64", 1.15, target="modelslim"),
    "rtn-w8a8": Recipe("linear_quant", "w8a8"),
    "rtn-w8a8-static": Recipe("linear_quant", "w8a8-static"),
    "rtn-w8a16": Recipe("linear_quant", "w8a16"),
    "rtn-auto": Recipe("linear_quant", "auto"),
    "rtn-w4a4": Recipe("linear_quant", "w4a4"),
    "rtn-w4a16-g64": Recipe("linear_quant", "w4a16-g64", target="modelslim"),
    "w8a8-static": Recipe("iter_smooth,linear_quant", "w8a8-static"),
    "rotated-auto": Recipe("iter_smooth,quarot,linear_quant", "auto"),
    "rotated-w4a4": Recipe("iter_smooth,quarot,online_rotation,linear_quant", "w4a4"),
}
"""Rows by name. Those with a bar come first; the others show what plain rounding does."""


def main(arguments: list[str] | None = None) -> int:
    """Compile, evaluate, print, record; 1 when a bar is missed on comparable texts."""
    barred = [name for name, recipe in RECIPES.items() if recipe.bar]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("row", nargs="*", help=f"rows to run (default: {' '.join(barred)}); all: every row")
    parser.add_argument("--keep", type=Path, help="keep the compiled checkpoints in this folder")
    options = parser.parse_args(arguments)
    wanted: list[str] = list(RECIPES) if options.row == ["all"] else options.row or barred
    if unknown := sorted(set(wanted) - set(RECIPES)):
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    references = [other for name in wanted if (kl_of := RECIPES[name].kl_of) for other in kl_of[:1]]
    texts, model = find_texts(), smollm2()
    print(texts)
    rows: list[Row] = []
    divergence: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in dict.fromkeys([*references, *wanted]):
            run, evaluation = _measure(name, model, texts, options.keep or Path(scratch))
            divergence[name] = evaluation.kl
            rows.append(_row(name, run, evaluation, divergence, comparable=texts.comparable))
            record("accuracy", rows[-1])
            print(
                f"{name}: {evaluation.ratio:.4f} times the float perplexity, {run.seconds:.0f} s", flush=True
            )
    table(f"SmolLM2-135M, {texts}", rows)
    return 1 if any(row["met"] is False for row in rows) else 0


def _measure(name: str, model: Path, texts: Texts, folder: Path) -> tuple[Measured, Evaluation]:
    recipe = RECIPES[name]
    out = folder / name
    calibration = [argument for file in texts.calibration for argument in ("--calib", file)]
    run = run_qc(
        *("compile", model, "--passes", recipe.passes, "--scheme", recipe.scheme, "--target", recipe.target),
        *calibration,
        *("--samples", str(SAMPLES), "--length", str(LENGTH), "--out", out, "--force"),
        quiet=False,
    )
    return run, evaluate(out, model, texts.evaluation, windows=WINDOWS, length=LENGTH)


def _row(
    name: str, run: Measured, evaluation: Evaluation, divergence: dict[str, float], *, comparable: bool
) -> Row:
    """One line of the table; ``met`` is None where there is no bar or the texts are not those of the bars."""
    recipe = RECIPES[name]
    share = divergence[name] / divergence[recipe.kl_of[0]] if recipe.kl_of else None
    met = None
    if comparable and recipe.bar is not None:
        met = evaluation.ratio <= recipe.bar
        if share is not None and recipe.kl_of is not None:
            met = met and share <= recipe.kl_of[1]
    return {
        "row": name,
        "passes": recipe.passes,
        "scheme": recipe.scheme,
        "ppl": evaluation.perplexity,
        "float ppl": evaluation.reference_perplexity,
        "multiple": evaluation.ratio,
        "± se": evaluation.ratio * evaluation.difference_error,
        "bar": recipe.bar,
        "KL": evaluation.kl,
        "KL of rtn": share,
        "top-1": evaluation.agreement,
        "seconds": run.seconds,
        "peak MB": run.peak / 1e6,
        "met": met,
    }


if __name__ == "__main__":
    raise SystemExit(main())
