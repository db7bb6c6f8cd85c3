"""What refining a calibration set does: block error on sequences that had no say, and perplexity after compiling.

The first samples of ``boolq.jsonl`` (``QC_DATA``) calibrate SmolLM2-135M, whole and refined.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.measure import run_qc
from benchmarks.records import record, table
from benchmarks.smollm2 import smollm2
from benchmarks.texts import find_texts
from qc.compiler.calib_refine import refine
from qc.compiler.calib_report import report_text
from qc.compiler.compile import Options
from qc.compiler.evaluate import evaluate


def main(arguments: list[str] | None = None) -> int:
    """Refine, compile both, evaluate both, print and record; 1 when the check or the divergence is no better."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--passes", default="iter_smooth,linear_quant")
    parser.add_argument("--scheme", default="w8a8-static")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--windows", type=int, default=12, help="windows of 256 tokens of the evaluation (default 12)"
    )
    given = parser.parse_args(arguments)
    texts, model = find_texts(), smollm2()
    if not texts.comparable:
        parser.error("QC_DATA names no data: a set of samples is needed")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        whole, refined = Path(scratch) / "whole.jsonl", Path(scratch) / "refined.jsonl"
        lines = texts.calibration[0].read_text(encoding="utf-8").splitlines(keepends=True)
        whole.write_text("".join(lines[: given.samples]), encoding="utf-8")
        options = Options(scheme=given.scheme, calib=(whole,), samples=given.samples, length=given.length)
        found = refine(model, given.passes, refined, options)
        print(report_text(found), flush=True)
        for name, file in (("whole", whole), ("refined", refined)):
            out = Path(scratch) / name
            run_qc(
                *("compile", model, "--passes", given.passes, "--scheme", given.scheme, "--calib", file),
                *("--samples", "1000", "--length", str(given.length), "--out", out),
                quiet=False,
            )
            e = evaluate(out, model, texts.evaluation, windows=given.windows, length=256)
            rows.append({
                "set": name, "samples": len(file.read_text(encoding="utf-8").splitlines()), "multiple": e.ratio,
                "± se": e.ratio * e.difference_error, "KL": e.kl, "top-1": e.agreement,
                "block error": None if name == "whole" or found.checked is None else str(found.checked),
                "met": None if name == "whole" else found.checked is not None and e.kl < rows[0]["KL"],
            })  # fmt: skip
    for row in rows:
        record("calibration", json.loads(json.dumps({**row, "passes": given.passes, "scheme": given.scheme})))
    table(f"SmolLM2-135M, {given.passes}, {given.scheme}", rows)
    return 0 if rows[1]["met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
