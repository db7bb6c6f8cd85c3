"""The file of a failed proof: it fails alone as it failed then, and no longer once the pass is mended."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import qc
from qc.compiler.reproducer import PREFIX, reproduce
from qc.compiler.scheme import W8A8, Rule, Scheme
from qc.compiler.testing_models import calibration, characters, checkpoint, tiny
from qc.passes.smooth_quant import SmoothQuant
from tests.pages import qc as command


class Forgetful(SmoothQuant):
    """Forgets a reader."""

    name = "smooth_quant"

    def rewrite(self, program: Any, setting: Any) -> Any:
        answer = super().rewrite(program, setting)
        fewer = tuple(dataclasses.replace(one, edits=one.edits[:-1]) for one in answer.rewrites)
        return dataclasses.replace(answer, rewrites=fewer)


def test_a_failed_proof_is_run_again_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(qc.NotEquivalent, match=r"qc reproduce .* proves this rewrite alone again") as caught:
        qc.compile(
            tiny("llama"), ["fuse_norms", Forgetful(), "linear_quant"], out=out, scheme="w8a8",
            tokenizer=characters(), calib=[calibration()], samples=2, length=32,
        )  # fmt: skip
    file = tmp_path / f"{PREFIX}out.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert str(file) in str(caught.value)
    found = reproduce(file, passes=["fuse_norms", Forgetful(), "linear_quant"])
    assert found.math == pytest.approx(found.then, rel=1e-6)
    assert found.math > 1e-3
    assert len(found.edits) == 3
    status, said = command(["reproduce", str(file)])  # the registered pass forgets nobody
    assert status == 0, said
    assert "smooth_quant at model.layers.0.input_layernorm (model.layers.0): changes the function by" in said


@pytest.mark.parametrize(
    ("quantizer", "scheme"),
    [
        ("linear_quant{strategies=w8a8:*proj}", None),
        ("linear_quant", Scheme("chosen", (Rule(include=("model.layers.{0,1}.*",), scheme=W8A8),))),
    ],
)
def test_formats_without_a_name_are_in_the_file(
    quantizer: str, scheme: Scheme | None, tmp_path: Path
) -> None:
    passes = ["fuse_norms", Forgetful(), quantizer]
    with pytest.raises(qc.NotEquivalent):
        qc.compile(
            tiny("llama"), passes, out=tmp_path / "out", scheme=scheme,
            tokenizer=characters(), calib=[calibration()], samples=2, length=32,
        )  # fmt: skip
    found = reproduce(tmp_path / f"{PREFIX}out.safetensors", passes=passes)
    assert found.math == pytest.approx(found.then, rel=1e-6)


def test_what_is_no_failed_proof_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "missing"):
        status, said = command(["reproduce", str(checkpoint("llama") / name)])
        assert status == 2
        assert "this is no file of a failed proof" in said
