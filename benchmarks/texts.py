"""Where tests and benchmarks find calibration and evaluation text.

``QC_DATA`` names the folder with the data that published numbers were measured on (default ``../shared/data``
beside the clone). Without it a small text of our own is used, and the numbers compare with nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION = ("boolq.jsonl", "mix_calib.jsonl")
EVALUATION = "wikitext2-valid.txt"


@dataclass(frozen=True)
class Texts:
    """Text to calibrate on and text to measure on."""

    calibration: tuple[Path, ...]
    """Files for ``--calib``; empty means the text that ships with qc."""
    evaluation: Path
    """File for ``qc eval --text``, which undoes WikiText's separators."""
    comparable: bool
    """Whether numbers measured on these texts compare with published ones."""

    def __str__(self) -> str:
        if self.comparable:
            names = ", ".join(path.name for path in self.calibration)
            return f"calibration {names}; evaluation {self.evaluation.name}"
        return "texts of our own (QC_DATA names no data): these numbers compare with no published ones"


def data_folder() -> Path:
    """The folder that ``QC_DATA`` names, or its default; it need not exist."""
    return Path(os.environ.get("QC_DATA") or ROOT.parent / "shared" / "data")


def find_texts() -> Texts:
    """The shared texts if all of them are there, else our own."""
    folder = data_folder()
    calibration = tuple(folder / name for name in CALIBRATION)
    evaluation = folder / EVALUATION
    if all(path.is_file() for path in (*calibration, evaluation)):
        return Texts(calibration, evaluation, comparable=True)
    return Texts((), ROOT / "benchmarks" / "evaluation.txt", comparable=False)
