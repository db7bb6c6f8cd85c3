"""``--avg-bits`` and ``--max-kl``: formats by measured error, within what the server runs as one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qc.compiler.allocation import curve
from qc.compiler.capture import capture
from qc.compiler.choose import _reaching, chosen
from qc.compiler.cli import main
from qc.compiler.compile import Options, compile, plan
from qc.compiler.cost import cost_of
from qc.compiler.errors import Refused
from qc.compiler.menu import Menu, formats_of, menu_of
from qc.compiler.plan import Plan, make_plan
from qc.compiler.recipe import read_recipe
from qc.compiler.scheme import W4A4, W8A8
from tests.homes import SAMPLES, Home
from tests.programs import captured

IDS = torch.randint(0, 90, (4, 32), generator=torch.Generator().manual_seed(0))


def asked(family: str, passes: str = "linear_quant", target: str = "vllm-ascend", **budget: object) -> Plan:
    planned_in = partial(_planned, family, passes, target)
    budget = {"avg_bits": None, "max_kl": None, "choose_from": None, **budget}
    return chosen(planned_in, ids=IDS, compute=torch.float32, **budget)  # type: ignore[arg-type]


def _planned(family: str, passes: str, target: str, scheme: object) -> Plan:
    return make_plan(captured(family), passes, scheme=scheme, target=target)  # type: ignore[arg-type]


def given(place: Home, **options: object) -> Options:
    return Options(calib=(place.text,), dtype="float32", **{**SAMPLES, **options})  # type: ignore[arg-type]


def test_formats_are_read_by_name() -> None:
    assert formats_of("w4a4, w8a8,float")[:2] == (W4A4, W8A8)
    for text in ("auto", " ,", "w5a5"):
        with pytest.raises(Refused):
            formats_of(text)


@pytest.mark.broad
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_menu_keeps_together_what_the_server_runs_as_one(family: str) -> None:
    menu = menu_of(
        formats_of("w4a4,w4a8,w8a8,float"), partial(_planned, family, "linear_quant", "vllm-ascend")
    )
    first = [place for place in menu.places if place.part == menu.places[0].part]
    shown = {
        str(place).removeprefix("model.layers.0."): [o.spelling for o in place.options] for place in first
    }
    dense = ["w4a4", "w8a8", "float"]
    assert shown.pop("self_attn.q_proj+k_proj+v_proj") == dense
    assert shown.pop("self_attn.o_proj") == dense
    if family == "mixtral":
        ((_, experts),) = shown.items()
        assert experts == ["w4a8", "w8a8", "float"]  # all experts of a layer, in what is served of them
        assert len(first[-1].linears) == 3 * captured(family).config.num_local_experts
    else:
        assert shown == {"mlp.gate_proj+up_proj": dense, "mlp.down_proj": dense}


@pytest.mark.broad
@pytest.mark.parametrize(("family", "bits"), [("llama", 9.0), ("qwen2", 6.5), ("mixtral", 8.5)])
def test_a_budget_of_bits_is_kept_and_its_divergence_is_as_predicted(family: str, bits: float) -> None:
    found = asked(family, "iter_smooth,quarot,linear_quant", avg_bits=bits)
    assert not found.problems
    assert found.choice is not None
    assert cost_of(found).bits_per_weight == pytest.approx(found.choice.point.bits)
    assert bits - 1.5 < found.choice.point.bits <= bits
    assert found.choice.point.measured is not None
    assert 0.4 < found.choice.point.measured / found.choice.point.predicted < 2.5  # routes of a mixture jump
    measured = [p.measured for p in found.choice.points if p.measured is not None]
    assert measured == sorted(measured, reverse=True)


@pytest.mark.broad
def test_a_bound_on_the_divergence_is_met_with_few_bits() -> None:
    choice = asked("llama", max_kl=0.002).choice
    assert choice is not None
    assert choice.point.measured is not None
    assert choice.point.measured <= 0.002
    fewer = [p for p in choice.points if p.bits < choice.point.bits and p.measured is not None]
    assert fewer
    assert all(p.measured is not None and p.measured > 0.002 for p in fewer)


@pytest.mark.parametrize("times", [0.03, 0.3, 3.0, 30.0])
def test_the_fewest_bits_are_found_where_predictions_are_wrong(times: float) -> None:
    """A divergence that is measured as a multiple of what was predicted: the search still ends at the first point."""
    costs = [[4 * n, 8 * n, 16 * n] for n in (3, 5, 7, 11, 13, 17)]
    errors = [[0.3 / n, 0.02 / n, 0.0] for n in (1, 2, 3, 4, 5, 6)]
    found = curve(costs, errors)
    menu = Menu((), 0, 1)

    def measure(points: Sequence[int]) -> dict[int, float]:
        return {point: times * float(found.errors[point]) for point in points}

    for max_kl in (1e-3, 0.01, 0.1, 1.0):
        point, measured = _reaching(menu, found, max_kl, measure)
        best = next(p for p in range(len(found)) if times * float(found.errors[p]) <= max_kl)
        assert measured[point] <= max_kl
        assert found.costs[point] <= 1.03 * found.costs[best]


def test_what_stands_beside_integers_is_in_the_budget() -> None:
    branch = "svd_res{rank=2, exclude=*mlp*},linear_quant"
    found = asked("llama", branch, "modelslim", avg_bits=10, choose_from="w8a8")
    assert found.choice is not None
    assert cost_of(found).bits_per_weight == pytest.approx(found.choice.point.bits)
    with pytest.raises(Refused, match=r"fewest are 8\.93 bits"):
        asked("llama", branch, "modelslim", avg_bits=8.6, choose_from="w8a8")


def test_a_format_that_a_pass_refuses_is_not_chosen() -> None:
    """Of a width of 96 flatquant has no transform, so this place keeps eight bits."""
    menu = menu_of(formats_of("w4a4,w8a8"), partial(_planned, "llama", "flatquant,gptq", "vllm-ascend"))
    options = {str(place).rpartition(".")[2]: place.options for place in menu.places}
    assert options["down_proj"] == (W8A8,)
    assert options["o_proj"] == (W4A4, W8A8)
    with pytest.raises(Refused, match=r"q_proj can have none of these formats: spqr: .*float activations"):
        menu_of(formats_of("w8a8"), partial(_planned, "llama", "spqr", "modelslim"))
    with pytest.raises(Refused, match="put iter_smooth before the quantizer"):
        asked("llama", "linear_quant,iter_smooth", avg_bits=6)


@pytest.mark.broad
def test_what_cannot_be_reached_is_refused_with_the_closest_point() -> None:
    with pytest.raises(Refused, match=r"fewest are 8\.\d+ bits .* 21 W8A8"):
        asked("llama", avg_bits=5, choose_from="w8a8,float")
    with pytest.raises(Refused, match=r"closest is KL 0\.\d+ nats per token at 8\.\d+ bits"):
        asked("llama", max_kl=1e-6, choose_from="w4a4,w8a8")
    with pytest.raises(Refused, match="leave their strategies out"):
        asked("llama", "linear_quant{strategies=w8a8:*}", avg_bits=6)
    with pytest.raises(Refused, match=r"no linear can be quantized .* stored as \[in, out\]"):
        asked("gpt2", avg_bits=6)
    with pytest.raises(Refused, match="no pass of this plan quantizes"):
        asked("llama", "iter_smooth", avg_bits=6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"avg_bits": 0.0}, "--avg-bits 0"),
        ({"max_kl": -1.0}, "--max-kl -1"),
        ({"avg_bits": 6.0, "max_kl": 1.0}, "two budgets"),
        ({"choose_from": "w8a8"}, "--avg-bits or --max-kl"),
        ({"avg_bits": 6.0, "scheme": "w8a8"}, "leave one of them out"),
        ({"avg_bits": 6.0, "fallback": "L2"}, "leave one of them out"),
    ],
)
def test_contradictions_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(Refused, match=words):
        Options(**options)  # type: ignore[arg-type]


@pytest.fixture
def spoiled(home: Callable[[str], Home], tmp_path: Path) -> Home:
    """A model whose down projection of layer 1 has one huge weight per row, which leaves four bits for nothing else.

    What it is multiplied by is next to nothing.
    """
    place = home("llama")
    (file,) = place.path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][:, 0] *= 300
    tensors["model.layers.1.mlp.up_proj.weight"][0] /= 3000
    (tmp_path / "model").mkdir()
    for other in place.path.iterdir():
        (tmp_path / "model" / other.name).write_bytes(other.read_bytes())
    save_file(tensors, tmp_path / "model" / file.name, metadata={"format": "pt"})
    return Home(tmp_path / "model", capture(tmp_path / "model", certify=False), place.text)


@pytest.mark.broad
def test_the_spoiled_linear_gets_the_bits(spoiled: Home, tmp_path: Path) -> None:
    """A budget that pays eight bits at one place pays it there, and the compile does what the plan said."""
    result = compile(
        spoiled.program,
        "linear_quant",
        tmp_path / "out",
        given(spoiled, avg_bits=5.5, choose_from="w4a4,w8a8"),
    )
    schemes = {str(n.target): n.meta["scheme"] for n in result.plan.final.graph.nodes if "scheme" in n.meta}
    assert schemes["model.layers.1.mlp.down_proj"] == W8A8
    assert W4A4 in schemes.values()
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.broad
def test_the_chosen_plan_is_an_ordinary_recipe(
    spoiled: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--calib", str(spoiled.text), "--samples", "15", "--length", "24"]
    command = ["plan", str(spoiled.path), "--passes", "linear_quant", "--avg-bits", "7", *common]
    curve = tmp_path / "curve.svg"
    assert main([*command, "--yaml", "--curve", str(curve)]) == 0
    (tmp_path / "chosen.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert curve.read_text(encoding="utf-8").startswith("<svg")
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    again = plan(spoiled.program, read_recipe(tmp_path / "chosen.yaml"), given(spoiled))
    assert not again.problems
    assert cost_of(again).bits_per_weight == pytest.approx(told["choice"]["chosen"]["bits_per_weight"])
    assert yaml.safe_load((tmp_path / "chosen.yaml").read_text(encoding="utf-8"))["spec"]["process"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "KL measured (rounding to nearest)" in text
    assert "->" in text
    assert "what costs most" in text


def test_a_curve_of_nothing_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "nowhere", "--passes", "linear_quant", "--curve", "x.svg"]) == 2
    assert "--avg-bits or --max-kl" in capsys.readouterr().err
    budget = ["plan", "nowhere", "--passes", "linear_quant", "--avg-bits", "6", "--curve"]
    for file, words in (("x.png", "ends in .svg"), (str(tmp_path / "no" / "x.svg"), "does not exist")):
        assert main([*budget, file]) == 2
        assert words in capsys.readouterr().err
