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


class Renamed(Forgetful):
    """The same with unknowns of another name, as happens while a pass is mended."""

    def rewrite(self, program: Any, setting: Any) -> Any:
        answer = super().rewrite(program, setting)
        return dataclasses.replace(answer, rewrites=tuple(map(renamed, answer.rewrites)))


def renamed(rewrite: qc.Rewrite) -> qc.Rewrite:
    (slot,) = rewrite.slots
    other = dataclasses.replace(slot, name=f"{rewrite.where}/other")
    edits = []
    for edit in rewrite.edits:
        assert isinstance(edit.operand, qc.Vector)
        edits.append(dataclasses.replace(edit, operand=dataclasses.replace(edit.operand, slot=other)))
    return dataclasses.replace(rewrite, edits=tuple(edits))


def test_evidence_that_can_not_be_kept_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qc.compiler.reproducer.save_file", full)
    with pytest.raises(
        qc.NotEquivalent, match=r"changes it by .* could not be kept .* No space left on device"
    ):
        qc.compile(
            tiny("llama"), ["fuse_norms", Forgetful(), "linear_quant"], out=tmp_path / "out", scheme="w8a8",
            tokenizer=characters(), calib=[calibration()], samples=2, length=32,
        )  # fmt: skip


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
    elsewhere = [Renamed(), "linear_quant"]
    with pytest.raises(
        qc.Refused, match=r"the pass now solves model.*/other, of which the file has no value"
    ):
        reproduce(file, passes=["fuse_norms", *elsewhere])
    status, said = command(["reproduce", str(file), "--model", str(tmp_path)])
    assert (status, "no config.json in this directory" in said) == (2, True)
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
    why = {
        "config.json": "(Error while deserializing", "model.safetensors": "nothing that qc says of them",
        "missing": "(no such file)", "": "(a directory)",
    }  # fmt: skip
    for name, words in why.items():
        status, said = command(["reproduce", str(checkpoint("llama") / name)])
        assert status == 2
        assert "this is no file of a failed proof" in said
        assert words in said
