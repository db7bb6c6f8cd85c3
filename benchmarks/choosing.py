"""Choosing formats: measured error against simpler rules at the same bits per weight, on SmolLM2-135M.

``python -m benchmarks.choosing [--bits B ...] [--fallback K ...] [--passes P]`` compiles the model once per rule and
budget and prints perplexity and divergence on the evaluation text. The rules share the budget, the passes, the places
(q, k, v together; gate and up together) and the two formats W4A4 and W8A8:

- ``chosen``: ``--avg-bits B``;
- ``kurtosis``: W8A8 for the places whose inputs have the highest kurtosis, as many as the budget pays;
- ``even``: W8A8 for whole blocks, evenly over the depth, as many as the budget pays;
- ``auto``: the scheme of that name, whose bits are the default budget.

With ``--fallback K``, instead: K places of a W4A4 model stay float, those that ``--fallback`` finds or those of the
highest kurtosis.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qc.compiler.analyze import analyze
from qc.compiler.capture import capture
from qc.compiler.compile import Options, compile, plan
from qc.compiler.cost import cost_of
from qc.compiler.evaluate import evaluate
from qc.compiler.menu import Menu, formats_of, menu_of
from qc.compiler.program import Program
from qc.compiler.scheme import Rule, Scheme

from .records import Row, record, table
from .smollm2 import smollm2
from .texts import find_texts

SAMPLES, LENGTH = 32, 512
PASSES = "iter_smooth,quarot,linear_quant"
FORMATS = "w4a4,w8a8"


def main(arguments: list[str] | None = None) -> int:
    """Compile, evaluate, print and record every rule at every budget."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=float, action="append", help="budgets (default: the bits of auto)")
    parser.add_argument("--fallback", type=int, action="append", help="numbers of places that stay float")
    parser.add_argument("--passes", default=PASSES)
    parser.add_argument("--windows", type=int, default=16)
    options = parser.parse_args(arguments)
    texts, model = find_texts(), smollm2()
    program = capture(model)
    given = Options(calib=texts.calibration, samples=SAMPLES, length=LENGTH)
    auto = cost_of(plan(program, options.passes, given), peak=False).bits_per_weight
    kurtosis = [score.name for score in analyze(program, given, metric="kurtosis").scores]
    menu = _menu(program, options.passes)
    rows: list[Row] = []
    budgets: dict[str, dict[str, Options]] = {}
    for count in options.fallback or ():
        left = by_kurtosis(menu, kurtosis)[:count]
        budgets[f"{count} places float"] = {
            "fallback": Options(calib=texts.calibration, scheme="w4a4", fallback=f"L{count}"),
            "kurtosis": Options(calib=texts.calibration, scheme=without(menu, left)),
        }
    for bits in options.bits or ([] if options.fallback else [auto]):
        rules = budgets[f"{bits:.2f} bits"] = {
            "chosen": Options(calib=texts.calibration, avg_bits=bits, choose_from=FORMATS),
            "kurtosis": Options(
                calib=texts.calibration, scheme=bought(menu, by_kurtosis(menu, kurtosis), bits)
            ),
            "even": Options(calib=texts.calibration, scheme=bought(menu, evenly(menu), bits)),
        }
        if not options.bits:
            rules["auto"] = Options(calib=texts.calibration, scheme="auto")
    for budget, rules in budgets.items():
        for rule, asked in rules.items():
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "out"
                result = compile(program, options.passes, out, asked)
                found = evaluate(out, model, texts.evaluation, windows=options.windows, length=LENGTH)
            row = {
                "rule": rule, "passes": options.passes, "budget": budget,
                "bits": cost_of(result.plan, peak=False).bits_per_weight, "multiple": found.ratio,
                "± se": found.ratio * found.difference_error, "KL": found.kl, "KL ± se": found.kl_error,
            }  # fmt: skip
            print(f"{rule}: {row['bits']:.2f} bits, KL {found.kl:.4f}", flush=True)
            rows.append(row)
            record("choosing", {**row, "windows": options.windows, "comparable": texts.comparable})
    table(f"SmolLM2-135M, {texts}", rows)
    return 0


def _menu(program: Program, passes: str) -> Menu:
    return menu_of(formats_of(FORMATS), lambda scheme: plan(program, passes, Options(scheme=scheme)))


def by_kurtosis(menu: Menu, ranked: Sequence[str]) -> list[int]:
    """The places, those first of which a linear stands first among ``ranked``."""
    order = {name: place for place, name in enumerate(ranked)}
    return sorted(range(len(menu.places)), key=lambda i: min(order[name] for name in menu.places[i].linears))


def evenly(menu: Menu) -> list[int]:
    """The places block by block, blocks in an order that halves the largest gap (van der Corput)."""
    parts = sorted({place.part for place in menu.places})
    width = (len(parts) - 1).bit_length()
    order = [k for i in range(1 << width) if (k := int(f"{i:0{width}b}"[::-1], 2)) < len(parts)]
    return [i for k in order for i, place in enumerate(menu.places) if place.part == parts[k]]


def bought(menu: Menu, order: Sequence[int], bits: float) -> Scheme:
    """W4A4, and W8A8 for the first places of an order that the budget still pays."""
    left = bits * menu.weights - menu.fixed_bits - sum(place.bits[0] for place in menu.places)
    better: list[str] = []
    for i in order:
        place = menu.places[i]
        more = place.bits[-1] - place.bits[0]
        if more <= left:
            left -= more
            better += place.linears
    low, high = menu.places[0].options[0], menu.places[0].options[-1]
    rules = (Rule(include=tuple(better), scheme=high),) if better else ()
    return Scheme("bought", (*rules, Rule(scheme=low)))


def without(menu: Menu, left: Sequence[int]) -> Scheme:
    """W4A4 for all places but some, which stay float."""
    names = tuple(name for i in left for name in menu.places[i].linears)
    return Scheme("without", (Rule(exclude=names, scheme=menu.places[0].options[0]),))


if __name__ == "__main__":
    raise SystemExit(main())
