"""Sensitivity: what was spoiled on purpose comes first, and the list can be pasted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qc.compiler.analyze import Score as S
from qc.compiler.analyze import analyze, linears_of, quantile, report_text, std, to_exclude
from qc.compiler.capture import capture
from qc.compiler.cli import main
from qc.compiler.compile import Options
from qc.compiler.errors import Refused
from qc.compiler.plan import make_plan
from qc.compiler.roles import routers
from qc.compiler.spread import kurtosis
from qc.compiler.targets.served import sites_of
from tests.homes import SAMPLES, Home
from tests.programs import captured


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_metrics_are_their_formulas() -> None:
    rows = randn(4000, 64)
    assert abs(kurtosis(rows)) < 0.5  # of a normal distribution it is zero
    assert quantile(rows) == pytest.approx(2 * float(rows.abs().max()) / 254 / 1.349, rel=0.1)
    assert std(rows) == pytest.approx(float(rows.abs().max()), rel=0.1)
    spoiled = rows.clone()
    spoiled[:, 3] *= 50
    assert kurtosis(spoiled) > 10
    assert quantile(spoiled) > 10 * quantile(rows)
    constant = torch.full((8, 4), 3.0)
    assert kurtosis(constant) == std(constant) == 0.0
    assert quantile(constant) > 0


@pytest.mark.broad
def test_it_rounds_as_the_quantizer_does(home: Callable[[str], Home]) -> None:
    """Offsets and groups count, and an error of four bits is that of the weight's own grid."""
    place = home("llama")
    given = Options(calib=(place.text,), dtype="float32", **SAMPLES)
    errors = {
        name: sum(s.value for s in analyze(place.program, given, metric="mse", scheme=name).scores)
        for name in ("w4a16", "w4a16-asym", "w4a16-g16", "w4a16-pt")
    }
    assert errors["w4a16-g16"] < errors["w4a16-asym"] < errors["w4a16"] < errors["w4a16-pt"]


@pytest.fixture
def spoiled(home: Callable[[str], Home], tmp_path: Path) -> Home:
    """A model of which one linear reads huge values, in layer 1, and one attention has a huge channel."""
    place = home("llama")
    (file,) = place.path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0] *= 3000
    tensors["model.layers.2.self_attn.v_proj.weight"][0] *= 1000
    (tmp_path / "model").mkdir()
    for other in place.path.iterdir():
        (tmp_path / "model" / other.name).write_bytes(other.read_bytes())
    save_file(tensors, tmp_path / "model" / file.name, metadata={"format": "pt"})
    return Home(tmp_path / "model", capture(tmp_path / "model", certify=False), place.text)


def options(place: Home) -> Options:
    return Options(calib=(place.text,), dtype="float32", **SAMPLES)


@pytest.mark.broad
@pytest.mark.parametrize("metric", ["kurtosis", "std", "quantile", "mse"])
def test_what_was_spoiled_comes_first(metric: str, spoiled: Home) -> None:
    found = analyze(spoiled.path, options(spoiled), metric=metric, scheme="w8a8-static", top=1)
    if metric != "mse":  # of which a huge channel is the loudest part, and heard well
        assert found.scores[0].name in ("model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj")
    assert len(found.scores) == 7 * len(spoiled.program.blocks)
    assert [s.value for s in found.scores] == sorted((s.value for s in found.scores), reverse=True)
    assert found.exclude == (found.scores[0].name,)
    layers = analyze(spoiled.path, options(spoiled), metric=metric, by="layer", scheme="w8a8-static", top=2)
    assert {"model.layers.1.*", "model.layers.2.*"} & set(layers.exclude)
    assert len(layers.scores) == len(spoiled.program.blocks)


@pytest.mark.broad
def test_attentions_are_compared_by_their_outputs(spoiled: Home) -> None:
    found = analyze(spoiled.path, options(spoiled), by="attention", top=1)
    assert found.metric == "mse"
    assert found.exclude == ("model.layers.2.self_attn",)


@pytest.mark.broad
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "phi3"])
def test_any_architecture_is_looked_at_and_fewer_bits_are_heard_more(
    family: str, home: Callable[[str], Home]
) -> None:
    place = home(family)
    given = Options(calib=(place.text,), dtype="float32", **SAMPLES)
    errors = [
        analyze(place.program, given, metric="mse", by="layer", scheme=scheme).scores[0].value
        for scheme in ("w8a8", "w4a8", "w4a4")
    ]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert not any(
        "gate." in s.name or s.name.endswith(".gate") for s in analyze(place.program, given).scores
    )


def test_linears_that_run_as_one_come_together_and_ties_come_too() -> None:
    program = captured("llama")
    attention = "model.layers.0.self_attn"
    scores = [
        S(f"{attention}.k_proj", 3.0),
        S("model.layers.1.mlp.down_proj", 2.0),
        S("model.layers.0.mlp.down_proj", 2.0),
    ]
    assert to_exclude(program, scores, "linear", 1) == [f"{attention}.{n}_proj" for n in "qkv"]
    assert to_exclude(program, scores, "linear", 2)[3:] == [s.name for s in scores[1:]]
    assert to_exclude(program, [S("model.layers.0", 1.0)], "layer", 5) == ["model.layers.0.*"]


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_the_list_is_one_that_a_server_loads(family: str) -> None:
    """Whatever is worst, a plan without it has no problem: the experts of a layer come together."""
    program = captured(family)
    every = [name for part in program.blocks for name in linears_of(program, part)]
    for worst in [name for name in every if ".0." in name and name not in routers(program)]:
        globs = to_exclude(program, [S(worst, 1.0)], "linear", 1)
        found = make_plan(program, f"linear_quant{{exclude={'+'.join(globs)}}}", scheme="w8a8")
        assert not found.problems, worst
        assert worst not in {site.name for site in sites_of(found) if site.scheme.quantized}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"metric": "fisher"}, "metrics are kurtosis, std, quantile, mse, kl"),
        ({"by": "head"}, "by linear, layer, attention"),
        ({"by": "attention", "metric": "std"}, "attentions are compared by mse"),
        ({"metric": "mse", "scheme": "float"}, "give formats to round to"),
        ({"scheme": "w8a9"}, "unknown scheme"),
        ({"top": 0}, "at least 1"),
    ],
)
def test_what_there_is_not_is_refused(given: dict[str, str | int], why: str) -> None:
    with pytest.raises(Refused, match=why):
        analyze(captured("llama"), Options(), **given)  # type: ignore[arg-type]


@pytest.mark.broad
def test_the_command_prints_a_table_and_json(spoiled: Home, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "analyze",
        str(spoiled.path),
        "--calib",
        str(spoiled.text),
        "--samples",
        "4",
        "--length",
        "24",
        "--top",
        "2",
    ]
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert text.startswith("kurtosis by linear, 21 in all")
    assert "exclude:\n- " in text
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exclude"]
    assert len(found["scores"]) == 21
    assert found["scores"][0]["name"] in text.splitlines()[2]
    assert main([*asked, "--metric", "fisher"]) == 2


def test_the_table_tells_how_many_it_leaves_out() -> None:
    from qc.compiler.analyze import Analysis

    scores = tuple(S(f"model.layers.{i}", 100.0 - i) for i in range(40))
    text = report_text(Analysis("mse", "layer", "w8a8", scores, ("model.layers.0.*",)))
    assert "mse by layer in w8a8, 40 in all" in text
    assert "and 25 more, down to 61" in text


@pytest.mark.broad
def test_divergences_add_up_to_what_layers_cost(home: Callable[[str], Home]) -> None:
    """By layer is the sum of the linears of a layer, and four bits cost more than eight."""
    place = home("llama")
    given = Options(calib=(place.text,), dtype="float32", **SAMPLES)
    linears = analyze(place.program, given, metric="kl", scheme="w4a4").scores
    layers = {
        s.name: s.value for s in analyze(place.program, given, metric="kl", by="layer", scheme="w4a4").scores
    }
    assert set(layers) == {part.name for part in place.program.blocks}
    for name, value in layers.items():
        assert value == pytest.approx(sum(s.value for s in linears if s.name.startswith(f"{name}.")))
    eight = {s.name: s.value for s in analyze(place.program, given, metric="kl", scheme="w8a8").scores}
    assert all(0 < eight[score.name] < score.value for score in linears)


@pytest.mark.broad
def test_scores_are_drawn(
    home: Callable[[str], Home], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = home("llama")
    common = [
        "analyze",
        str(place.path),
        "--calib",
        str(place.text),
        "--samples",
        "4",
        "--length",
        "24",
        "--plot",
    ]
    assert main([*common, str(tmp_path / "scores.svg")]) == 0
    drawn = (tmp_path / "scores.svg").read_text(encoding="utf-8")
    assert drawn.count("<rect") == 1 + 7 * len(place.program.blocks)
    assert "model.layers.0.mlp.down_proj" in drawn
    assert main([*common, str(tmp_path / "scores.png")]) == 2
    assert "ends in .svg" in capsys.readouterr().err
