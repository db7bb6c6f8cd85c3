"""Recipes: what a file says is what ``--passes`` says, or it is refused with the line and what was meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import qc
from qc.compiler.cli import main
from qc.compiler.compile import Options, plan
from qc.compiler.contract import Setting
from qc.compiler.cost import cost_of
from qc.compiler.errors import Refused
from qc.compiler.operand import Quantize
from qc.compiler.plan import Plan
from qc.compiler.plan_text import plan_text
from qc.compiler.recipe import Recipe, read_recipe
from qc.compiler.scheme import (
    FLOAT,
    W4A4,
    W4A16_G64,
    W8A8,
    W8A8_MIX,
    W8A8_STATIC,
    W8A8_STATIC_SYMMETRIC,
    Int,
    LinearScheme,
    Rule,
)
from qc.compiler.spelling import passes_of
from qc.passes.autoround import AutoRound
from qc.passes.iter_smooth import IterSmooth
from qc.passes.linear_quant import LinearQuant
from qc.passes.presets import quarot
from tests.homes import SAMPLES, Home, tensors_of
from tests.plans import schemes
from tests.programs import captured
from tests.recipes import HEAD, INT4_G64, INT8, NONE, QCONFIGS, STATIC, TOKEN, Written

LAOS = (
    QCONFIGS
    + """
metadata: {config_id: small, score: 90, label: {w_bit: 4, a_bit: 4, is_sparse: False, kv_cache: False}}
spec:
  runner: layer_wise
  process:
    - type: "iter_smooth"
      alpha: 0.9
      scale_min: 1e-5
      symmetric: False
      enable_subgraph_type: [ "ov", "up-down" ]
    - {type: quarot, online: yes, block_size: 16}
    - {type: iter_smooth, alpha: 9e-1, symmetric: true, enable_subgraph_type: ["norm-linear"]}
    - type: "autoround_quant"
      iters: 40
      enable_minmax_tuning: True
      strategies:
        - qconfig: *w8a8
          exclude: ["*.{up,gate}_proj", "*.o_proj", "model.layers.{0,1,2}.mlp.down_proj"]
        - qconfig: *w4a4
          include: ["*.{up,gate}_proj", "*.o_proj", "model.layers.{0,1,2}.mlp.down_proj"]
  save: [{type: ascendv1_saver, part_file_size: 4}]
"""
)
"""What laos-v1.yaml does, in what is built of it."""
SPELLED = (
    "iter_smooth{alpha=0.9, scale_min=1e-5, symmetric=false, enable_subgraph_type=ov+up-down},"
    "quarot{online=true, block_size=16, max_tp_size=4},iter_smooth{alpha=0.9, enable_subgraph_type=norm-linear},"
    "autoround{iters=40, strategies=w8a8:*|!*.{up,gate}_proj|!*.o_proj|!model.layers.{0,1,2}.mlp.down_proj"
    "+w4a4:*.{up,gate}_proj|*.o_proj|model.layers.{0,1,2}.mlp.down_proj}"
)


def told(found: Plan) -> list[str]:
    """The text of a plan without its notes, in which a recipe and a list of passes differ."""
    return [line for line in shown(found).splitlines() if not line.startswith("note: ")]


def shown(found: Plan) -> str:
    """The text of a plan without the estimate of memory, which depends on the process."""
    return plan_text(found, cost=cost_of(found, peak=False))


# A recipe and the command line meet in one plan.


def test_a_recipe_and_the_command_line_make_the_same_plan(written: Written) -> None:
    program = captured("llama-128")
    recipe = read_recipe(written(LAOS))
    found, spelled = plan(program, recipe), plan(program, SPELLED, Options(target="modelslim"))
    assert told(found) == told(spelled)
    rewrites = [[step.answer.rewrites for step in one.steps] for one in (found, spelled)]
    assert rewrites[0] == rewrites[1]
    assert set(schemes(found).values()) == {"W8A8", "W4A4"}
    pasted = ",".join(str(step.what) for step in found.steps)
    again = plan(program, pasted, Options(target="modelslim"))
    assert told(again) == told(found), "a printed plan is a list of passes"


def test_fields_have_the_types_of_the_dataclass(written: Written) -> None:
    passes = read_recipe(written(HEAD + """
    - {type: iter_smooth, alpha: 1, scale_min: 1E-3, symmetric: no, include: ["*.v_proj"], exclude: ~}
    - {type: iter_smooth, alpha: "0.7", enable_subgraph_type: ~, group_method: mean}
    - {type: quarot}
    - {type: linear_quant, include: ["*.{up,down}_proj", "*.0.*"], exclude: []}
""")).passes  # fmt: skip
    assert passes == (
        IterSmooth(alpha=1.0, scale_min=1e-3, symmetric=False, include=("*.v_proj",)),
        IterSmooth(alpha=0.7, group_method="mean"),
        *quarot(),
        LinearQuant(include=("*.{up,down}_proj", "*.0.*")),
    )
    assert isinstance(passes[0], IterSmooth)
    assert [type(value) for value in (passes[0].alpha, passes[0].symmetric)] == [float, bool]


def test_the_plan_says_where_it_comes_from(written: Written) -> None:
    path = written(LAOS + "  dataset: texts/a.txt\n")
    (path.parent / "texts").mkdir()
    (path.parent / "texts" / "a.txt").write_text("a text")
    recipe, program = read_recipe(path), captured("llama-128")
    found = plan(program, recipe)
    assert found.target.name == "modelslim"
    assert found.notes[0] == "from recipe.yaml: passes, target modelslim, dataset texts/a.txt"
    assert any(
        note.startswith("quarot on line 19 is fuse_norms, rotate_residual{block_size=16}")
        for note in found.notes
    )
    given = plan(program, recipe, Options(target="vllm-ascend", calib=["b.txt"]))
    assert given.target.name == "vllm-ascend"
    assert given.notes[0] == "from recipe.yaml: passes"
    assert "not taken from recipe.yaml: target modelslim, dataset texts/a.txt" in given.notes
    assert plan(program, read_recipe(written(HEAD + "    - type: linear_quant"))).target.name == "vllm-ascend"
    assert not any("from" in note for note in plan(program, "linear_quant").notes)


@given(
    st.builds(
        IterSmooth,
        alpha=st.floats(0, 1), scale_min=st.floats(1e-30, 1e6), symmetric=st.booleans(),
        enable_subgraph_type=st.none() | st.lists(st.sampled_from(["ov", "up-down", "norm-linear"])).map(tuple),
        include=st.lists(st.text("ab*.{},?é\n:#'- ", min_size=1, max_size=8), min_size=1).map(tuple),
        group_method=st.sampled_from(["max", "mean"]),
    )
)  # fmt: skip
def test_options_come_back_from_yaml(tmp_path_factory: pytest.TempPathFactory, what: IterSmooth) -> None:
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in what.options().items()}
    document = {"apiversion": "modelslim_v1", "spec": {"process": [{"type": "iter_smooth", **options}]}}
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    assert read_recipe(path).passes == (what,)


# Formats of its own.


def test_a_qconfig_says_how_scales_are_found(written: Written) -> None:
    qconfig = f"{{weight: {INT8.replace('minmax', 'ssz')}, act: {STATIC.replace('minmax', 'histogram')}}}"
    recipe = read_recipe(written(f"{HEAD}    - {{type: linear_quant, qconfig: {qconfig}}}"))
    rule = Rule(scheme=W8A8_STATIC, weight_method="ssz", act_method="histogram")
    assert recipe.passes == (LinearQuant(strategies=(rule,)),)
    assert str(recipe.passes[0]) == "linear_quant{strategies=w8a8-static@ssz@histogram}"
    (spelled,), _ = passes_of(str(recipe.passes[0]))
    found = spelled.rewrite(captured("llama-128"), Setting(scheme=None, roles={})).rewrites[0]
    operand = found.edits[0].operand
    assert isinstance(operand, Quantize)
    assert (operand.scheme, operand.weight_method, operand.act_method) == (W8A8_STATIC, "ssz", "histogram")


@pytest.mark.parametrize(
    ("qconfig", "scheme"),
    [
        (f"{{weight: {INT8}, act: {TOKEN}}}", W8A8),
        (f"{{weight: {INT8}, act: {STATIC}}}", W8A8_STATIC),
        (f"{{weight: {INT8}, act: {STATIC.replace('false', 'true')}}}", W8A8_STATIC_SYMMETRIC),
        (f"{{weight: {INT8}, act: {STATIC.replace('per_tensor', 'pd_mix')}}}", W8A8_MIX),
        (f"{{weight: {INT8}, act: {NONE}}}", LinearScheme(Int(8, "channel"))),
        (f"{{weight: {INT4_G64}}}", W4A16_G64),
        (f"{{weight: {INT4_G64.replace('64', '32')}, act: {TOKEN.replace('8', '4')}}}",
         LinearScheme(Int(4, "group", group=32), Int(4, "token"))),
        (f"{{weight: {NONE}}}", FLOAT),
    ],
)  # fmt: skip
def test_a_qconfig_is_a_scheme(written: Written, qconfig: str, scheme: LinearScheme) -> None:
    recipe = read_recipe(
        written(f"{HEAD}    - {{type: linear_quant, qconfig: {qconfig}}}\n  save: [{{type: ascendv1_saver}}]")
    )
    assert recipe.passes == (LinearQuant(strategies=(Rule(scheme=scheme),)),)
    found = plan(captured("llama-128"), recipe)
    assert found.problems == ()
    assert set(schemes(found).values()) == ({str(scheme)} if scheme.quantized else set())
    (spelled,), _ = passes_of(str(recipe.passes[0]))
    assert isinstance(spelled, LinearQuant)
    again = plan(captured("llama-128"), [spelled], Options(target="modelslim"))
    assert schemes(again) == schemes(found)


def test_two_quantizers_have_their_own_formats(written: Written) -> None:
    recipe = read_recipe(written(f"""{QCONFIGS}
spec:
  process:
    - {{type: linear_quant, include: ["*.mlp.*"], qconfig: {{weight: {INT8}}}}}
    - {{type: autoround, strategies: [{{qconfig: *w4a4, include: ["*.o_proj", "*.down_proj"]}}, "w8a8:*.q_proj"]}}
"""))  # fmt: skip
    assert recipe.passes[1] == AutoRound(
        strategies=(Rule(include=("*.o_proj", "*.down_proj"), scheme=W4A4), "w8a8:*.q_proj")
    )
    found = plan(captured("llama-128"), recipe, Options(target="modelslim"))
    assert found.problems == ()
    layer = {name.rpartition(".")[2]: scheme for name, scheme in schemes(found).items() if ".0." in name}
    mlp = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "W8A16")
    assert layer == {**mlp, "o_proj": "W4A4", "q_proj": "W8A8"}
    assert "scheme strategies" in plan_text(found)
    given = plan(captured("llama-128"), recipe, Options(scheme="w8a8", target="modelslim"))
    assert len(given.problems) == 1
    assert "scheme w8a8 is read by no pass" in given.problems[0]


def test_a_glob_that_stands_for_too_many_is_refused(written: Written) -> None:
    recipe = read_recipe(written(HEAD + "    - {type: linear_quant, include: ['*.{1..100000}']}"))
    with pytest.raises(Refused, match="more than 10000 globs"):
        plan(captured("llama-128"), recipe)


def test_a_quantizer_without_formats_takes_the_scheme(written: Written) -> None:
    recipe = read_recipe(written(HEAD + "    - type: linear_quant"))
    found = plan(captured("llama-128"), recipe, Options(scheme="w8a16"))
    assert set(schemes(found).values()) == {"W8A16"}
    assert found.problems == ()


# The command line and Python.


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run ``qc`` on a family that is captured already: exit status, output, errors."""
    monkeypatch.setattr("qc.compiler.compile.capture", lambda model, **options: captured(str(model)))

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            status = main(argv)
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_plan_takes_a_recipe(command: Any, written: Written) -> None:
    path = str(written(LAOS))
    status, out, err = command("plan", "llama-128", "--config", path)
    assert (status, err) == (0, "")
    assert "modelslim, scheme strategies" in out
    assert "note: from recipe.yaml: passes, target modelslim" in out
    status, out, _ = command("plan", "llama-128", "--config", path, "--json")
    assert status == 0
    (options,) = [one["options"] for one in json.loads(out)["passes"] if one["name"] == "autoround"]
    assert options["strategies"][1].startswith("w4a4:*.{up,gate}_proj|")
    status, out, _ = command("plan", "llama-128", "--config", path, "--target", "vllm-ascend")
    assert "vllm-ascend, scheme strategies" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--config", "RECIPE", "--passes", "quarot"), "not allowed with argument --config"),
        ((), "one of the arguments --passes --config is required"),
        (("--config", "RECIPE.not"), "RECIPE.not: no such file; give a recipe that exists"),
        (("--config", "."), "this is a directory"),
    ],
)  # fmt: skip
def test_one_of_passes_and_config_is_given(
    command: Any, written: Written, argv: tuple[str, ...], words: str
) -> None:
    path = str(written(LAOS))
    status, out, err = command("plan", "llama-128", *(word.replace("RECIPE", path) for word in argv))
    assert (status, out) == (2, "")
    assert words.replace("RECIPE", path) in err


def test_python_takes_a_recipe(written: Written) -> None:
    path, program = written(LAOS), captured("llama-128")
    assert shown(qc.plan(program, config=path)) == shown(plan(program, read_recipe(path)))
    with pytest.raises(qc.Refused, match="give one of them"):
        qc.plan(program, "quarot", config=path)
    with pytest.raises(qc.Refused, match="passes= or config="):
        qc.plan(program)
    with pytest.raises(qc.Refused, match="no passes were given"):
        qc.plan(program, "")


def test_a_dataset_that_is_not_there_asks_for_calib(written: Written) -> None:
    path, program = written(LAOS + "  dataset: boolq.jsonl\n"), captured("llama-128")
    with pytest.raises(Refused, match=r"dataset 'boolq.jsonl' is no file.*--calib"):
        qc.plan(program, config=path)
    other = path.with_name("other.txt")
    other.write_text("the quick brown fox")
    assert plan(program, read_recipe(path), Options(calib=(other,))).problems == ()
    (path.parent / "boolq.jsonl").mkdir()
    with pytest.raises(Refused, match=r"is no file.*--calib"):
        qc.plan(program, config=path)


def test_a_compile_from_a_recipe(home: Callable[[str], Home], written: Written) -> None:
    place = home("llama-128")
    path = written(f"""
apiversion: modelslim_v1
spec:
  process:
    - {{type: iter_smooth, alpha: 0.5}}
    - type: linear_quant
      qconfig:
        weight: {{scope: per_group, dtype: int8, symmetric: true, method: minmax, ext: {{group_size: 32}}}}
        act: {TOKEN}
  save: [{{type: ascendv1_saver, part_file_size: 0}}]
  dataset: calibration.txt
""")
    folder = path.parent
    (folder / "calibration.txt").write_bytes(place.text.read_bytes())
    qc.compile(place.program, config=path, out=folder / "a", **SAMPLES)
    spelled = "iter_smooth{alpha=0.5},linear_quant{strategies=w8a8-g32}"
    qc.compile(place.program, spelled, out=folder / "b", target="modelslim", calib=[place.text], **SAMPLES)
    one, other = tensors_of(folder / "a"), tensors_of(folder / "b")
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    inputs = json.loads((folder / "a" / "qc_manifest.json").read_text())["inputs"]
    assert inputs["recipe/recipe.yaml"]["bytes"] == path.stat().st_size
    assert any("calibration.txt" in name for name in inputs)
    assert (
        "note: from recipe.yaml: passes, target modelslim, dataset calibration.txt"
        in (folder / "a" / "qc_plan.txt").read_text()
    )
    with pytest.raises(Refused, match=r"contains the input .*recipe\.yaml"):
        qc.compile(place.program, config=path, out=folder, force=True, calib=[place.text])


def test_options_of_a_recipe_give_way_to_those_of_the_call() -> None:
    recipe = Recipe(Path("r.yaml"), (LinearQuant(),), target="modelslim", part_file_size=1)
    found = plan(captured("llama-128"), recipe, Options(scheme="w4a16"))
    assert found.problems == ()
    assert plan(captured("llama-128"), replace(recipe, target=None), Options(scheme="w4a16")).problems
