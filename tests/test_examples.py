"""The passes of docs/examples: short, sound by the ready-made suite, and better than what they start from."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qc
from qc.compiler.testing import check
from qc.compiler.testing_models import calibration, characters, tiny

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
LONGEST = 60


def example(file: str, cls: str) -> Any:
    """A class of an example."""
    spec = importlib.util.spec_from_file_location(file, FOLDER / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[file] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return getattr(module, cls)


@pytest.mark.parametrize("file", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_an_example_is_short(file: str) -> None:
    lines = (FOLDER / f"{file}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < LONGEST


@pytest.mark.broad
@pytest.mark.parametrize(
    ("file", "cls", "options", "suite"),
    [
        ("learned_alpha", "LearnedAlpha", {"steps": 3}, {"scheme": "w8a8", "refuses": [{"steps": -1}]}),
        ("outlier_order", "OutlierOrder", {}, {"scheme": "w4a16-g64"}),
        ("error_correction", "ErrorCorrection", {"rank": 4, "rounds": 2}, {"refuses": [{"rounds": 0}]}),
    ],
)
def test_an_example_stands_the_suite(file: str, cls: str, options: Any, suite: Any) -> None:
    assert check(example(file, cls)(**options), families=("llama", "qwen3_moe"), **suite).wrong == ()


def noise(passes: Any, scheme: str, tmp_path: Path) -> torch.Tensor:
    """Signal to noise of all quantized linears of a tiny Llama, dB, in order."""
    result = qc.compile(
        tiny("llama"), passes, out=tmp_path / "out", scheme=scheme, target="modelslim", force=True,
        tokenizer=characters(), calib=[calibration()], samples=2, length=32,
    )  # fmt: skip
    found = [entry["sqnr_db"] for entry in result.journal.entries if "sqnr_db" in entry]
    return torch.tensor([value for one in found for _, value in sorted(one.items())])


def test_the_correction_is_better_than_the_largest_directions(tmp_path: Path) -> None:
    correction = example("error_correction", "ErrorCorrection")(rank=8)
    plain = noise("linear_quant", "w4a16", tmp_path)
    directions = noise("svd_res{rank=8},linear_quant", "w4a16", tmp_path)
    corrected = noise([correction, "linear_quant"], "w4a16", tmp_path)
    assert corrected.mean() > directions.mean() > plain.mean()


def test_an_order_that_is_none_is_refused(tmp_path: Path) -> None:
    order = example("outlier_order", "OutlierOrder")

    class Twice(order):
        """Takes one channel twice."""

        def solve(self, rewrite: Any, view: Any) -> Any:
            ((slot, found),) = super().solve(rewrite, view).items()
            return {slot: torch.cat([found[:1], found[:-1]])}

    with pytest.raises(qc.Failed, match="does not hold every channel once"):
        qc.compile(tiny("llama"), [Twice(), "linear_quant"], out=tmp_path / "out", scheme="w8a8")
    assert not (tmp_path / "out").exists()
