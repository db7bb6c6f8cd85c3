"""Bisect: numbers are those of the compiled model, what was spoiled is named, and the answer is a plan that helps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qc
from benchmarks.random_llama import character_tokenizer
from qc.compiler.bisect import (
    PIECES,
    Bisection,
    PlaceLoss,
    StepLoss,
    bisect,
    carriers,
    first_past,
    heaviest,
    pieces,
)
from qc.compiler.bisect_text import bisect_json, bisect_text
from qc.compiler.capture import capture
from qc.compiler.compile import Options
from qc.compiler.errors import Refused
from qc.compiler.logit_divergence import divergence
from qc.compiler.program import Program
from tests.homes import SAMPLES, Home, compiled
from tests.pages import qc as command
from tests.programs import captured

SPOILED = "model.layers.1.mlp.down_proj"
PASSES = "iter_smooth{enable_subgraph_type=ov},quarot,linear_quant"


def given(place: Home, **more: Any) -> Options:
    calib = (place.text,)
    return Options(calib=calib, dtype="float32", tokenizer=character_tokenizer(), **SAMPLES, **more)


@pytest.fixture(scope="module")
def spoiled(home: Callable[[str], Home], tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A model that means the same to a float run, but for one linear: huge weights read a channel that is zero."""
    place, folder = home("llama"), tmp_path_factory.mktemp("spoiled")
    for other in place.path.iterdir():
        (folder / other.name).write_bytes(other.read_bytes())
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0] = 0
    tensors[f"{SPOILED}.weight"][:, 0] = 100
    save_file(tensors, file, metadata={"format": "pt"})
    return Home(folder, capture(folder, certify=False), place.text)


@pytest.mark.broad
def test_what_was_spoiled_is_named_and_the_plan_without_it_helps(spoiled: Home) -> None:
    found = bisect(spoiled.program, PASSES, given(spoiled, scheme="w8a8"), max_kl=0.005)
    assert found.culprit is not None
    assert found.culprit.spelling == "linear_quant"
    assert found.blamed == (SPOILED,)
    assert found.groups[0].places == (SPOILED,)
    assert found.groups[0].added > 0.5 * found.culprit.added
    assert found.kl_without is not None
    assert found.kl_without < 0.1 * found.culprit.kl
    assert found.without is not None
    plan = qc.plan(spoiled.program, found.without, scheme="w8a8")
    assert plan.problems == ()
    assert plan.formats.keys() == {str(name) for name in _linears(spoiled.program)} - {SPOILED}
    exact = found.steps[1:-1]
    assert {one.spelling.partition("{")[0] for one in exact} >= {"iter_smooth", "rotate_residual"}
    assert all(abs(one.kl) < 0.001 for one in exact)  # what is left is rounding to bfloat16


def _linears(program: Program) -> list[str]:
    blocks = {part.index for part in program.blocks}
    return [
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_module" and node.meta["part"] in blocks
        and program.leaves[str(node.target)].kind == "linear"
    ]  # fmt: skip


@pytest.mark.broad
@pytest.mark.parametrize(("family", "passes", "scheme"), [
    ("llama", "iter_smooth,quarot,gptq", "w4a4"),
    ("gpt2", "iter_smooth,linear_quant", "w4a8"),
    ("mixtral", "linear_quant", "w8a8"),
])  # fmt: skip
def test_the_last_number_is_that_of_the_compiled_model(
    family: str, passes: str, scheme: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    """Against the checkpoint as it is written and loaded, in the model's own code."""
    place = home(family)
    options = given(place, scheme=scheme, target="modelslim")
    found = bisect(place.program, passes, options)
    compiled(place, tmp_path / "out", passes, dtype="float32", scheme=scheme, target="modelslim")
    ids = qc.compiler.compile.calibration_of(place.program, options).tokens
    reference = qc.load(place.path, dtype=torch.float32)
    other = qc.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        total = sum(divergence(reference(row[None]).logits[0], other(row[None]).logits[0]) for row in ids)
    assert found.steps[-1].kl == pytest.approx(total / ids.numel(), rel=0.02)
    assert found.tokens == ids.numel()


def weighed(**weights: float) -> Callable[[Sequence[tuple[str, ...]]], list[PlaceLoss]]:
    def measure(groups: Sequence[tuple[str, ...]]) -> list[PlaceLoss]:
        assert len(groups) <= PIECES
        added = [sum(weights.get(place, 0.001) for place in group) for group in groups]
        return [PlaceLoss(group, kl, kl) for group, kl in zip(groups, added, strict=True)]

    return measure


def test_the_search_splits_what_is_heavy() -> None:
    places = tuple(f"p{i}" for i in range(400))
    measure = weighed(p17=5.0, p333=4.0)
    (whole,) = measure([places])
    groups = heaviest(whole, measure)
    assert sorted(place for group in groups for place in group.places) == sorted(places)
    assert groups[0].places == ("p17",)
    assert carriers(groups, whole.added) == ("p17",)
    three = weighed(p3=3.0, p17=5.0, p333=4.9)
    (whole,) = three([places])
    assert set(carriers(heaviest(whole, three), whole.added)) == {"p17", "p333"}
    assert carriers(heaviest(measure([("p17",)])[0], measure), 5.0) == ("p17",)
    assert carriers(heaviest(measure([places[20:300]])[0], weighed()), 0.28) == ()  # it is spread


def test_pieces_are_all_places_in_order() -> None:
    for count in (2, 3, PIECES, PIECES + 1, 100):
        places = tuple(map(str, range(count)))
        split = pieces(places)
        assert tuple(place for piece in split for place in piece) == places
        assert max(map(len, split)) - min(map(len, split)) <= 1


STEPS = (
    StepLoss(0, "", 0, 0.0, 0.0),
    StepLoss(1, "a", 3, 0.02, 0.02),
    StepLoss(2, "b", 2, 0.03, 0.01),
    StepLoss(3, "c{exclude=x}", 2, 0.01, -0.02),
)


@pytest.mark.parametrize(("max_kl", "number"), [(None, 1), (0.01, 1), (0.025, 2), (0.03, None)])
def test_the_first_step_past_the_limit(max_kl: float | None, number: int | None) -> None:
    step = first_past(STEPS, max_kl)
    assert (step.number if step else None) == number


def test_a_plan_that_stays_within_the_limit_says_so_with_its_numbers() -> None:
    text = bisect_text(Bisection(0.5, 100, "bfloat16", STEPS, None))
    assert "no step passes --max-kl 0.5: the plan ends at 0.01, and the most is 0.03 after step 2" in text
    assert "2. b" in text


def test_numbers_that_are_not_finite_are_null_for_machines() -> None:
    step = StepLoss(1, "a", 1, float("inf"), float("inf"))
    found = Bisection(None, 100, "bfloat16", (*STEPS[:1], step), 1, (), ("x",))
    assert json.loads(json.dumps(bisect_json(found), allow_nan=False))["steps"][1]["kl"] is None
    assert "cannot leave them out" in bisect_text(found)


@pytest.mark.parametrize(
    ("passes", "max_kl", "why"),
    [
        ("linear_qant", None, "did you mean linear_quant"),
        ("linear_quant{exclude=nowhere}", None, "nowhere"),
        ("linear_quant", 0.0, "--max-kl 0: nats per token, more than 0"),
        ("linear_quant", float("nan"), "--max-kl nan"),
    ],
)
def test_what_there_is_not_is_refused(passes: str, max_kl: float | None, why: str) -> None:
    with pytest.raises(Refused, match=why):
        bisect(captured("llama"), passes, Options(tokenizer=character_tokenizer()), max_kl=max_kl)


@pytest.mark.broad
def test_the_command_prints_a_table_and_json(spoiled: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qc.compiler.compile.capture", lambda *given, **more: spoiled.program)
    asked = ["bisect", str(spoiled.path), "--passes", "linear_quant", "--scheme", "w8a8", "--samples", "4"]
    asked += ["--length", "24", "--calib", str(spoiled.text)]
    status, said = command(asked)
    assert status == 0
    assert f"most of it: {SPOILED}" in said
    assert f'--passes "linear_quant{{exclude={SPOILED}}}"' in said
    status, said = command([*asked, "--json", "--max-kl", "10"])
    assert status == 0
    assert json.loads(said[said.index("{") :])["step"] is None
