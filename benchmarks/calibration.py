"""What refining a calibration set does: block error on sequences that had no say, and divergence after compiling.

The first samples of ``boolq.jsonl`` (``QC_DATA``) calibrate SmolLM2-135M, whole and refined. Both are compared with the
float model on the samples that follow and on WikiText-2.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.measure import run_qc
from benchmarks.records import Row, record, table
from benchmarks.smollm2 import smollm2
from benchmarks.texts import find_texts
from qc.compiler.calib_refine import FEWEST, refine
from qc.compiler.calib_report import report_text
from qc.compiler.compile import Options
from qc.compiler.evaluate import evaluate


def main(arguments: list[str] | None = None) -> int:
    """Refine, compile both, evaluate both, print and record; 1 when its own kind of text is no better."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--passes", default="iter_smooth,linear_quant")
    parser.add_argument("--scheme", default="w8a8-static")
    parser.add_argument("--samples", type=int, default=16, help=f"at least {FEWEST} (default 16)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default 128)")
    parser.add_argument(
        "--windows", type=int, default=12, help="windows of 256 tokens of the evaluation (default 12)"
    )
    given = parser.parse_args(arguments)
    if given.samples < FEWEST:
        parser.error(f"--samples {given.samples}: leaving one out takes at least {FEWEST}")
    texts, model = find_texts(), smollm2()
    if not texts.comparable:
        parser.error("QC_DATA names no data: a set of samples is needed")
    rows: list[Row] = []
    divergence: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        whole, refined, own = (Path(scratch) / f"{name}.jsonl" for name in ("whole", "refined", "own"))
        lines = texts.calibration[0].read_text(encoding="utf-8").splitlines(keepends=True)
        if len(lines) <= given.samples:
            parser.error(
                f"--samples {given.samples}: {texts.calibration[0]} has {len(lines)}, some to evaluate on"
            )
        whole.write_text("".join(lines[: given.samples]), encoding="utf-8")
        own.write_text("".join(lines[given.samples :]), encoding="utf-8")
        options = Options(scheme=given.scheme, calib=(whole,), samples=given.samples, length=given.length)
        found = refine(model, given.passes, refined, options)
        print(report_text(found), flush=True)
        if not found.dropped:
            return 0
        for name, file in (("whole", whole), ("refined", refined)):
            out = Path(scratch) / name
            run_qc(
                *("compile", model, "--passes", given.passes, "--scheme", given.scheme, "--calib", file),
                *("--samples", "1000", "--length", str(given.length), "--out", out),
                quiet=False,
            )
            row: dict[str, str | int | float | bool | None] = {
                "set": name, "samples": len(file.read_text(encoding="utf-8").splitlines()),
                "block error": None if name == "whole" else str(found.checked),
            }  # fmt: skip
            for text, kind in ((own, "own"), (texts.evaluation, "WikiText")):
                e = evaluate(out, model, text, windows=given.windows, length=256)
                row |= {f"{kind}: multiple": e.ratio, f"{kind}: ± se": e.ratio * e.difference_error}
                row |= {f"{kind}: KL": e.kl, f"{kind}: KL ± se": e.kl_error}
                divergence += [e.kl] if kind == "own" else []
            row["met"] = None if name == "whole" else divergence[1] < divergence[0]
            rows.append(row)
    for one in rows:
        record("calibration", {**one, "passes": given.passes, "scheme": given.scheme})
    table(f"SmolLM2-135M, {given.passes}, {given.scheme}", rows)
    return 0 if rows[1]["met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
