"""The report's data: what a compile did, told without the clock, whole and small."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from qc.compiler.capture import capture
from qc.compiler.clock import Clock
from qc.compiler.export import MANIFEST, RUN
from qc.compiler.plan import make_plan
from qc.compiler.report.data import report_data
from qc.compiler.report.linears import kind_of
from qc.compiler.report.page import REPORT, page
from qc.compiler.report.states import MOST, states_of
from qc.compiler.solve import Progress
from qc.compiler.verify import verify
from tests.families import GQA, build
from tests.homes import Home, compiled

PASSES = "iter_smooth,quarot,autoround{iters=4}"


def data_in(out: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', (out / REPORT).read_text(encoding="utf-8"), re.S)
    assert found
    return json.loads(found.group(1))


def test_a_compile_writes_a_report_of_what_it_did(home: Callable[[str], Home], tmp_path: Path) -> None:
    result = compiled(home("llama-128"), tmp_path / "out", PASSES, scheme="auto")
    data = data_in(tmp_path / "out")
    assert [step["name"] for step in data["steps"]] == [step.what.name for step in result.plan.steps]
    assert (
        data["summary"]["proofs"]
        == result.journal.proofs
        == sum(len(c["math"]) for c in data["certificates"])
    )
    assert [part["title"] for part in data["parts"]] == ["prologue", "layers 0..2", "epilogue"]
    block = data["parts"][1]
    assert len(block["states"]) == len(data["steps"]) + 1
    assert any("W4A4" in line for line in block["diffs"][-1])
    assert any(", proved, error" in line for line in block["rewrites"][0])
    linears = {row["kind"]: row for row in data["linears"]}
    down = linears["mlp.down_proj"]
    assert down["format"] == ["W8A8"] * 3
    assert all(20 < value < 60 for value in down["sqnr"])
    assert down["weight"]["before"]["high"] != down["weight"]["after"]["high"]
    assert set(linears["mlp.gate_proj"]["bits"]) == {4}
    (losses,) = data["losses"]
    assert all(curves["held-out loss"][0][0] == 0 for curves in losses["layers"])
    assert all(len(curves["training loss"]) == 4 for curves in losses["layers"])
    assert data["run"] is None
    assert "model/model.safetensors" in [name for name, _, _ in data["provenance"]["inputs"]]
    assert str(tmp_path) not in (tmp_path / "out" / REPORT).read_text(encoding="utf-8")
    assert REPORT in json.loads((tmp_path / "out" / MANIFEST).read_text())["outputs"]
    assert [check for check in verify(tmp_path / "out") if check.wrong] == []


def test_a_pass_that_stands_twice_has_its_own_numbers(home: Callable[[str], Home], tmp_path: Path) -> None:
    passes = "iter_smooth,linear_quant{include=*mlp*},linear_quant{include=*self_attn*}"
    compiled(home("llama-128"), tmp_path / "out", passes, scheme="w8a8")
    steps = data_in(tmp_path / "out")["steps"]
    assert [(step["name"], step["linears"]) for step in steps[1:]] == [
        ("linear_quant", 9), ("linear_quant", 12)
    ]  # fmt: skip
    assert steps[0]["proofs"] > 0


def commands_in(out: Path) -> tuple[str, str]:
    """What the report and the model card say of how to repeat a compile."""
    (line,) = (
        line for line in (out / "README.md").read_text().splitlines() if line.startswith("`qc compile")
    )
    return data_in(out)["provenance"]["command"], line.strip("`")


def test_the_command_says_all_that_the_weights_depend_on(home: Callable[[str], Home], tmp_path: Path) -> None:
    asked = {"target": "vllm-ascend[A3]==0.18", "seed": 3, "dtype": "float32", "fallback": "L1"}
    compiled(home("llama-128"), tmp_path / "out", "iter_smooth,linear_quant", scheme="w8a8", **asked)
    told, card = commands_in(tmp_path / "out")
    assert told == card
    assert re.fullmatch(
        r'qc compile MODEL --passes "iter_smooth,linear_quant\{exclude=model\.layers\..*\}" --scheme w8a8'
        r" --target 'vllm-ascend\[A3\]==0\.18' --seed 3 --calib calibration\.txt --samples 15 --length 24"
        r" --dtype float32 --out OUT",
        told,
    )


def test_the_command_of_chosen_formats_has_the_budget(home: Callable[[str], Home], tmp_path: Path) -> None:
    compiled(home("llama-128"), tmp_path / "out", "linear_quant", avg_bits=6.0, choose_from="w4a4,w8a8")
    assert commands_in(tmp_path / "out")[0] == (
        'qc compile MODEL --passes "linear_quant" --avg-bits 6 --choose-from w4a4,w8a8 --target vllm-ascend'
        " --calib calibration.txt --samples 15 --length 24 --out OUT"
    )


def test_the_run_is_told_of_only_when_asked(home: Callable[[str], Home], tmp_path: Path) -> None:
    compiled(home("llama-128"), tmp_path / "out", "linear_quant", scheme="w8a8", timings=True)
    told = data_in(tmp_path / "out")["run"]
    run = json.loads((tmp_path / "out" / RUN).read_text())
    assert told == run
    assert {"plan", "load", "linear_quant", "write"} <= set(told["stages"])
    assert sum(told["stages"].values()) == pytest.approx(told["seconds"], abs=0.2)


def test_a_clock_gives_every_second_to_one_stage() -> None:
    seen: list[Progress] = []
    clock = Clock(seen.append)
    for part, what in (("a", "load"), ("a", "autoround"), ("a", "autoround 2/4 loss 1"), ("b", "load")):
        clock(Progress(part, 0, 2, what))
    total = clock.stop()
    assert list(clock.stages) == ["plan", "load", "autoround"]
    assert list(clock.parts) == ["a", "b"]
    assert sum(clock.stages.values()) == pytest.approx(total)
    assert len(seen) == 4


def test_experts_are_told_as_one(home: Callable[[str], Home], tmp_path: Path) -> None:
    compiled(home("mixtral"), tmp_path / "out", "linear_quant", scheme="w8a8")
    data = data_in(tmp_path / "out")
    (down,) = [row for row in data["linears"] if row["kind"].endswith("down_proj")]
    assert "*" in down["kind"]
    assert down["experts"] > 1
    entries = map(json.loads, (tmp_path / "out" / "qc_journal.jsonl").read_text().splitlines())
    (noise,) = (e["sqnr_db"] for e in entries if "sqnr_db" in e and e["part"] == "model.layers.0")
    assert down["sqnr"][0] == min(value for name, value in noise.items() if name.endswith("down_proj"))


def test_the_name_of_a_kind_has_no_numbers_of_its_own() -> None:
    assert kind_of("model.layers.3.mlp.experts.17.up_proj", "model.layers.3") == "mlp.experts.*.up_proj"
    assert kind_of("h.0.attn.c_attn", "h.0") == "attn.c_attn"
    assert kind_of("model.layers.3.fc1", "model.layers.3") == "fc1"


def test_no_text_of_the_data_can_leave_its_element() -> None:
    spoiled = "</script><script>alert(1)</script>"
    made = page({"title": spoiled, "notes": [spoiled]})
    assert made.count("</script>") == 2
    assert "<title>&lt;/script&gt;" in made
    assert made == page({"title": spoiled, "notes": [spoiled]})


@pytest.mark.broad
def test_four_hundred_layers_are_one_drawing_per_state() -> None:
    program = capture(build(LlamaConfig(**GQA | {"num_hidden_layers": 400})), certify=False)
    plan = make_plan(program, PASSES, scheme="auto")
    found = states_of(plan, ())
    assert [part["title"] for part in found["parts"]] == ["prologue", "layers 0..399", "epilogue"]
    assert len(found["drawings"]) <= 3 * (len(plan.steps) + 1)
    assert found["parts_left_out"] == 0


def test_kinds_of_parts_beyond_the_drawn_ones_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qc.compiler.report.states.MOST", 2)
    program = capture(build(LlamaConfig(**GQA | {"num_hidden_layers": 4})), certify=False)
    found = states_of(make_plan(program, "linear_quant{exclude=*layers.2.mlp*}", scheme="w8a8"), ())
    assert MOST > 2
    assert [part["title"] for part in found["parts"]] == ["prologue", "layers 0..1, 3"]
    assert found["parts_left_out"] == 2


def test_the_data_is_a_function_of_plan_and_journal(home: Callable[[str], Home], tmp_path: Path) -> None:
    result = compiled(home("llama-128"), tmp_path / "out", "iter_smooth,linear_quant", scheme="w8a8")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    one, two = (
        report_data(result.plan, result.journal, manifest, "qc compile", result.calibration) for _ in range(2)
    )
    assert page(one) == page(two)
