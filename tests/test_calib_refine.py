"""Refining a calibration set: leaving one out is what solving without it gives, and what was spoiled is found."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.random_llama import character_tokenizer
from qc.compiler.calib_refine import Check, Gain, Judges, Refinement, gain_of, refine, stand_ins
from qc.compiler.calib_report import report_text
from qc.compiler.calibration import read_samples
from qc.compiler.capture import capture
from qc.compiler.cli import main
from qc.compiler.compile import Options, plan
from qc.compiler.errors import Refused
from qc.compiler.input_maps import InputMap, moved
from qc.compiler.leave_one_out import Trial, block_errors
from qc.compiler.operand import Statistic
from tests.homes import Home

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "dog",
    "while",
    "cat",
    "sleeps",
    "on",
    "mat",
]


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=8)) for _ in range(count)]


def written(path: Path, lines: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(lines)), encoding="utf-8"
    )
    return path


def ids_of(lines: list[str]) -> list[Tensor]:
    return [torch.tensor([character_tokenizer()(line)["input_ids"][:24]]) for line in lines]


@pytest.mark.parametrize(
    ("family", "passes", "scheme"),
    [
        ("llama", "iter_smooth,linear_quant", "w8a8"),
        ("llama", "iter_smooth,linear_quant", "w8a8-static"),
        ("llama", "iter_smooth{symmetric=false},linear_quant", "w8a8-static"),
        ("llama", "linear_quant{weight_method=clip}", "w4a16-g16"),
        ("llama", "quarot,linear_quant", "w8a8-static"),
        ("mixtral", "iter_smooth,linear_quant", "w8a8-static"),
    ],
)
def test_leaving_one_out_is_solving_without_it(
    family: str, passes: str, scheme: str, home: Callable[[str], Home]
) -> None:
    """What one sweep says of a set without a sample is what a sweep says that never saw the sample."""
    planned = plan(
        home(family).program, passes, Options(scheme=scheme, target="modelslim", dtype="float32")
    ).require()
    sequences = ids_of(texts(6))
    whole = frozenset(range(4))
    without = [Trial(whole - {i}, (4, 5)) for i in range(3)]
    together = block_errors(planned, sequences, [Trial(whole, (4, 5)), *without], torch.float32)
    for trial, found in zip(without, together[1:], strict=True):
        (alone,) = block_errors(planned, sequences, [trial], torch.float32)
        assert found == pytest.approx(alone, rel=0.02)
        assert all(error > 0 for error in found.values())
    assert len({found[4] for found in together}) > 1  # and it is not the same for all


def test_inputs_are_moved_as_edits_move_them() -> None:
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    scale, shift = torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)
    here = InputMap(1 / scale, torch.zeros(8))
    there = InputMap(torch.ones(8), -shift)
    x = rows / scale
    factor, offset = here.to(there)
    y = rows - shift
    assert torch.allclose(x * factor + offset, y, atol=1e-6)
    observed = torch.stack([x.amin(0), x.amax(0)])
    assert torch.allclose(
        moved(Statistic("range", "m"), observed, factor, offset),
        torch.stack([y.amin(0), y.amax(0)]),
        atol=1e-6,
    )
    for kind, of in {
        "absmax": lambda z: z.abs().amax(0),
        "absmean": lambda z: z.abs().mean(0),
        "meansquare": lambda z: z.square().mean(0),
        "hessian": lambda z: z.T @ z / len(z),
    }.items():
        got = moved(Statistic(kind, "m"), of(x), scale, torch.zeros(8))
        assert torch.allclose(got, of(rows), rtol=1e-4, atol=1e-5), kind


def test_who_judges_is_in_no_set_that_is_compared() -> None:
    for count in (8, 13, 40):
        judges = Judges(count, seed=3)
        assert not set(judges.groups[0]) & set(judges.groups[1])
        assert all(i not in judges.of(i) for i in range(count))
        dropped = frozenset(i for i in range(count) if i not in (*judges.groups[0], *judges.groups[1]))
        last = judges.last(frozenset(sorted(dropped)[: count // 4]))
        assert last
        assert not set(last) & {*judges.groups[0], *judges.groups[1]}
    outside = Judges(8, 0, range(8, 13))
    assert outside.of(3) == (8, 10, 12)
    assert outside.last(frozenset()) == (9, 11)


def test_enough_are_left_to_judge_again_and_to_check() -> None:
    """All that judged nothing hurt: were all of them dropped, nobody could say whether that helps."""
    for count in (8, 12, 33):
        judges = Judges(count, seed=0)
        hurts = [i for i in range(count) if i not in (*judges.groups[0], *judges.groups[1])][: count // 2]

        def measure(trials: Sequence[Trial], hurts: list[int] = hurts) -> list[dict[int, float]]:
            return [{q: 1.0 + len(trial.members & set(hurts)) for q in trial.judged} for trial in trials]

        check = Check(frozenset(range(count)), hurts, (), judges)
        check.run(measure, 0.01)
        assert len(check.last) >= 2
        assert check.drop
        assert not check.refutes
    assert list(Judges(8, 0).checkable(Judges(8, 0).order[:4])) == Judges(8, 0).order[:2]
    with pytest.raises(Refused, match="3 windows, and 4 are needed"):
        Judges(8, 0, range(8, 11))


def test_a_gain_is_a_share_of_the_error_with_its_standard_error() -> None:
    gain = gain_of({0: 2.0, 1: 4.0}, {0: 1.0, 1: 3.5}, (0, 1))
    assert gain.mean == pytest.approx(1.5 / 6)
    assert gain.error == pytest.approx(torch.tensor([1.0, 0.5]).std().item() * 2**0.5 / 6)
    assert str(Gain(0.125, 0.01)) == "-12.50 % ± 1.00"


@pytest.fixture
def spoiled(home: Callable[[str], Home], tmp_path: Path) -> Home:
    """A model in which one letter that no word has, z, is an outlier."""
    place = home("llama")
    (file,) = place.path.glob("*.safetensors")
    tensors = load_file(file)
    (letter,) = character_tokenizer()("z")["input_ids"]
    tensors["model.embed_tokens.weight"][letter, 1] = 80.0
    (tmp_path / "model").mkdir()
    for other in place.path.iterdir():
        (tmp_path / "model" / other.name).write_bytes(other.read_bytes())
    save_file(tensors, tmp_path / "model" / file.name, metadata={"format": "pt"})
    text = written(tmp_path / "calib.jsonl", [*texts(15), "zzz quick zzz fox zzz", *texts(4, 1)])
    return Home(tmp_path / "model", capture(tmp_path / "model", certify=False), text)


GIVEN: dict[str, Any] = {"scheme": "w8a8-static", "target": "modelslim", "dtype": "float32"}
GIVEN |= {"length": 24, "samples": 18}


def test_the_sample_that_spoils_the_ranges_is_dropped(spoiled: Home, tmp_path: Path) -> None:
    """It goes, and a usual sentence in its place stays."""
    lines = [json.loads(line)["text"] for line in spoiled.text.read_text(encoding="utf-8").splitlines()]
    usual = written(tmp_path / "usual.jsonl", [*lines[:15], *texts(1, 2), *lines[16:]])

    def of(file: Path) -> Refinement:
        return refine(
            spoiled.program, "linear_quant", tmp_path / "out.jsonl",
            Options(calib=(file,), force=True, **GIVEN),
        )  # fmt: skip

    found = of(spoiled.text)
    mine = found.verdicts[0]
    assert mine.sample.text == "zzz quick zzz fox zzz"
    assert mine.dropped
    assert mine.gain.sure > 0.05
    assert found.checked is not None
    assert found.checked.mean > 0.1
    said = report_text(found)
    assert f"dropped  {spoiled.text}, line 16" in said
    assert f"dropped {len(found.dropped)}: error -" in said
    assert mine.sample.text not in [one.text for one in read_samples([found.path])]
    mine = next(v for v in of(usual).verdicts if v.sample.where.endswith(" line 16"))
    assert not mine.dropped


def test_a_sample_that_only_seemed_to_hurt_beside_another_stays() -> None:
    """Errors as ranges make them: 0 is far out, 1 less far, and 2 changes nothing."""

    def measure(trials: Sequence[Trial]) -> list[dict[int, float]]:
        def error(trial: Trial) -> float:
            return max(2.0 if 0 in trial.members else 0.0, 1.5 if 1 in trial.members else 1.0)

        return [{q: error(trial) + 0.001 * q for q in trial.judged} for trial in trials]

    judges, whole = Judges(20, 0), frozenset(range(20))

    def chosen(hurts: list[int]) -> Check:
        check = Check(whole, hurts, (), judges)
        check.run(measure, 0.01)
        return check

    assert chosen([0, 1]).drop == {0, 1}
    assert chosen([1, 0]).drop == frozenset()  # without 1 nothing changes as long as 0 is there
    assert chosen([0, 2, 1]).drop == {0}
    only = chosen([0, 2])
    assert only.checked is not None
    assert only.checked.mean == pytest.approx(0.25, abs=0.01)


def test_what_is_written_is_what_was_kept_and_the_bad_cases(spoiled: Home, tmp_path: Path) -> None:
    out, bad = tmp_path / "out.jsonl", written(tmp_path / "bad.jsonl", ["dog dog dog", "mat mat"])
    options = Options(calib=(spoiled.text,), **GIVEN)
    found = refine(spoiled.program, "linear_quant", out, options, add=[bad])
    dropped = {verdict.sample.where for verdict in found.dropped}
    stayed = [one.item for one in read_samples([spoiled.text]) if one.where not in dropped]
    assert [one.item for one in read_samples([out])] == [*stayed, *(one.item for one in read_samples([bad]))]
    assert found.kept == len(stayed) + 2
    assert found.on_added is not None
    assert "added 2: error" in report_text(found)
    again = tmp_path / "again.jsonl"
    refine(spoiled.program, "linear_quant", again, options, add=[bad])
    assert again.read_bytes() == out.read_bytes()


def test_a_text_of_ones_own_judges(spoiled: Home, tmp_path: Path) -> None:
    judge = tmp_path / "judge.txt"
    judge.write_text("zzz quick zzz fox zzz dog zzz " * 8, encoding="utf-8")
    options = Options(calib=(spoiled.text,), **GIVEN)
    found = refine(spoiled.program, "linear_quant", tmp_path / "out.jsonl", options, judge=[judge])
    mine = next(v for v in found.verdicts if "zzz" in v.sample.text)
    assert mine.gain.mean < 0  # who speaks like this needs the sample
    assert not mine.dropped


def test_what_the_check_does_not_confirm_stays(spoiled: Home) -> None:
    sample = read_samples([spoiled.text])[0]
    from qc.compiler.calib_refine import Verdict

    found = Refinement(
        Path("o.jsonl"),
        "p",
        24,
        2,
        (Verdict(sample, Gain(0.1, 0.0)),),
        0,
        1,
        Gain(-0.02, 0.001),
        True,
        None,
        None,
    )
    assert "dropped nothing: what seemed to hurt makes +2.00 % ± 0.10" in report_text(found)
    assert "seem to hurt" not in report_text(found)
    kept = report_text(replace(found, refuted=False, checked=None, seemed=3))
    assert "no sample hurts enough\nkept 3 that seem to hurt alone" in kept


def test_passes_that_train_are_stood_in_for(home: Callable[[str], Home]) -> None:
    program = home("llama").program
    options = Options(scheme="w4a16-g16", target="modelslim", dtype="float32")
    trial, notes = stand_ins(plan(program, "iter_smooth,gptq{exclude=*down_proj}", options))
    assert [str(step.what) for step in trial.steps][
        1
    ] == "linear_quant{weight_method=clip, exclude=*down_proj}"
    assert notes == ("gptq trains, and linear_quant{weight_method=clip} stands in for it",)
    with pytest.raises(Refused, match=r"flatquant trains, .*quarot\{online=true\}"):
        stand_ins(plan(program, "flatquant,gptq", replace(options, scheme="w4a4", target="vllm-ascend")))
    with pytest.raises(Refused, match="no sample can hurt"):
        stand_ins(plan(program, "linear_quant", options))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"samples": 7}, "--samples 7: leaving one out takes at least 8"),
        ({"calib": ()}, "no calibration set"),
        ({"worth": -1.0}, "--worth"),
        ({"most": 0.9}, "share up to 0.5"),
        ({"out": "calib.jsonl"}, "this is an input"),
        ({"judge": ["the fox"]}, "fewer than one window"),
    ],
)
def test_what_cannot_be_refined_is_refused(
    given: dict[str, Any], why: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    calib = written(tmp_path / "calib.jsonl", texts(10))
    options = Options(**GIVEN | {"calib": given.pop("calib", (calib,)), "samples": given.pop("samples", 18)})
    if "judge" in given:
        given["judge"] = [written(tmp_path / "judge.jsonl", given["judge"])]
    out = tmp_path / given.pop("out", "out.jsonl")
    with pytest.raises(Refused, match=why):
        refine(home("llama").program, "linear_quant", out, options, **given)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.broad
def test_the_command(spoiled: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["calib", "refine", str(spoiled.path), "--passes", "linear_quant", "--scheme", "w8a8-static"]
    asked += ["--calib", str(spoiled.text), "--length", "24", "--out", str(tmp_path / "out.jsonl")]
    assert main(asked) == 0
    said = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*asked, "--force", "--curve", "c.svg"])  # nothing is chosen here
    assert said.startswith("20 samples, at most 24 tokens of each, for linear_quant --scheme w8a8-static")
    assert said.endswith(
        f"wrote {tmp_path / 'out.jsonl'}: {len(read_samples([tmp_path / 'out.jsonl']))} samples\n"
    )
    assert main(asked) == 2
