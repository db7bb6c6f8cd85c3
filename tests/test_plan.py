"""A plan says everything before a weight is read: what will happen, at what cost, and all that is wrong."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from syrupy.assertion import SnapshotAssertion

from qc.compiler.capture import capture
from qc.compiler.cli import main
from qc.compiler.compile import plan as plan_of
from qc.compiler.cost import cost_of
from qc.compiler.memory import Run
from qc.compiler.plan import make_plan
from qc.compiler.plan_text import plan_json, plan_text
from qc.compiler.scheme import W4A4, W8A8, Rule, Scheme
from qc.passes.iter_smooth import IterSmooth
from tests.plans import RTN, only, planned, schemes
from tests.programs import Drawing, aten, config_of

# Order.

LATE = "iter_smooth{{enable_subgraph_type={}}}"
WRONG_ORDERS: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    "ov after an online rotation": (
        f"iter_smooth,quarot{{online=true}},{LATE.format('ov')},{RTN}", {"scheme": "w4a4"},
        ("ov sites after online_rotation|already expect the channels|Put it before online_rotation",),
    ),
    "up-down after an online rotation": (
        f"online_rotation,{LATE.format('up-down')},{RTN}", {"scheme": "w4a4"},
        ("up-down sites after online_rotation|leave up-down out",),
    ),
    "norm-linear before a norm fusion": (
        f"{LATE.format('norm-linear')},quarot,{RTN}", {},
        ("norm-linear sites before fuse_norms|takes the gain back|Put it after fuse_norms",),
    ),
    "a rotation after a quantizer": (
        f"{RTN},online_rotation", {"scheme": "w4a4"},
        ("online_rotation rewrites 6 linears|o_proj|put online_rotation before the quantizer",),
    ),
    "smoothing after a quantizer": (
        f"{RTN},{LATE.format('up-down')}", {},
        ("iter_smooth rewrites 6 linears|quantized|put iter_smooth before",),
    ),
    "a residual rotation without fused norms": (
        f"rotate_residual,{RTN}", {},
        ("rotate_residual requires|norm gains are one|put fuse_norms before it",),
    ),
    "a residual rotation over gains that smoothing has brought back": (
        f"fuse_norms,iter_smooth,rotate_residual,{RTN}", {},
        ("rotate_residual requires|put fuse_norms before it",),
    ),
    "heads rotated behind an online rotation": (
        f"online_rotation,rotate_heads,{RTN}", {"scheme": "w4a4"},
        ("rotate_heads takes ov-heads sites after online_rotation|Put it before online_rotation",),
    ),
    "everything at once": (
        f"quarot{{online=true}},{LATE.format('ov+up-down')},{RTN},rotate_residual", {"scheme": "w4a4"},
        ("ov sites after online", "up-down sites after online", "rotate_residual requires|fuse_norms"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ORDERS)
def test_a_wrong_order_is_refused_with_its_reason_and_its_fix(name: str) -> None:
    passes, options, expected = WRONG_ORDERS[name]
    only(planned("llama-128", passes, **options), *expected)


@pytest.mark.parametrize(
    ("passes", "scheme"),
    [
        ("iter_smooth,linear_quant", "auto"),
        ("iter_smooth,quarot,linear_quant", "auto"),
        ("iter_smooth,quarot,iter_smooth,linear_quant", "auto"),
        ("iter_smooth,quarot,iter_smooth,online_rotation,iter_smooth,linear_quant", "w4a4"),
        ("quarot{online=true},iter_smooth{enable_subgraph_type=norm-linear},linear_quant", "w4a4"),
        ("iter_smooth,quarot{online=true},linear_quant", "w4a4"),
        ("linear_quant{include=*.q_proj},linear_quant", "w8a8"),
    ],
)
def test_a_right_order_has_no_problem(passes: str, scheme: str) -> None:
    only(planned("llama-128", passes, scheme=scheme))


DEFAULTS = [
    ("iter_smooth,quarot", 0, "up-down, ov, linear-linear: norm-linear is left out"),
    ("quarot,iter_smooth", 3, "up-down, ov, linear-linear, norm-linear"),
    ("iter_smooth", 0, "up-down, ov, linear-linear, norm-linear"),
    ("online_rotation,iter_smooth", 1, "norm-linear: after an online rotation"),
    ("quarot{online=true},iter_smooth", 4, "norm-linear: after an online rotation"),
    ("rotate_heads,iter_smooth", 1, "up-down, ov, linear-linear, norm-linear"),
]


@pytest.mark.parametrize(("passes", "at", "note"), DEFAULTS)
def test_smoothing_takes_by_default_what_is_meaningful_where_it_stands(
    passes: str, at: int, note: str
) -> None:
    found = planned("llama-128", f"{passes},linear_quant", scheme="w4a4")
    step = found.steps[at]
    assert isinstance(step.what, IterSmooth)
    (said,) = step.answer.notes
    assert said.startswith(note)
    taken = {rewrite.pattern for rewrite in step.answer.rewrites}
    assert taken == {name for name in ("up-down", "ov", "norm-linear") if name in note.partition(":")[0]}
    only(found)


def test_types_that_are_asked_for_are_taken_without_a_word() -> None:
    found = planned("llama", "iter_smooth{enable_subgraph_type=ov},linear_quant")
    assert found.steps[0].answer.notes == ()
    assert {rewrite.pattern for rewrite in found.steps[0].answer.rewrites} == {"ov"}


# Schemes.


def test_auto_gives_the_writers_of_gated_products_four_bits() -> None:
    for family, gated in (("llama", ("gate_proj", "up_proj")), ("phi3", ("gate_up_proj",))):
        for name, scheme in schemes(planned(family, RTN)).items():
            assert scheme == ("W4A4" if name.endswith(gated) else "W8A8"), name
    assert not any("gated product" in note for note in planned("llama", RTN).notes)


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_auto_without_a_gated_product_is_eight_bits_and_says_so(family: str) -> None:
    found = planned(family, RTN)
    assert set(schemes(found).values()) == {"W8A8"}
    assert any("no gated product" in note and "W8A8" in note for note in found.notes)
    assert not any("gated product" in note for note in planned(family, RTN, scheme="w8a8").notes)


def test_only_linears_of_blocks_are_quantized() -> None:
    names = schemes(planned("llama", RTN, scheme="w4a4"))
    assert len(names) == 21
    assert all(name.startswith("model.layers.") for name in names)


def test_experts_are_linears_and_routers_stay_float() -> None:
    found = planned("mixtral", RTN)
    assert any(note.startswith("3 layers hold experts, 4 in the first of them") for note in found.notes)
    assert set(schemes(found).values()) == {"W8A8"}
    assert len(schemes(found)) == 3 * (4 + 4 * 3)
    assert not any(name.endswith("mlp.gate") for name in schemes(found))
    silent = planned("mixtral", RTN, scheme="float").notes + planned("llama", RTN).notes
    assert not any("stay float" in note or "stays float" in note for note in silent)


def test_all_experts_can_be_calibrated_where_there_are_any() -> None:
    only(planned("mixtral", RTN, calibrate_all_experts=True))
    only(planned("llama", RTN, calibrate_all_experts=True), "calibrate-all-experts|no experts|leave it out")


def test_the_first_rule_that_matches_wins_and_an_unused_one_is_an_error() -> None:
    rules = (Rule(include=("model.layers.{0,2}.mlp.*",), scheme=W4A4), Rule(scheme=W8A8))
    found = planned("llama", RTN, scheme=Scheme("mine", rules))
    fours = [name for name, scheme in schemes(found).items() if scheme == "W4A4"]
    assert fours == [f"model.layers.{i}.mlp.{x}_proj" for i in (0, 2) for x in ("gate", "up", "down")]
    wrong = Scheme("mine", (Rule(include=("*.donw_proj",), scheme=W4A4), *rules))
    only(
        planned("llama", RTN, scheme=wrong),
        "scheme mine|'*.donw_proj' matches nothing|did you mean '*.down_proj'?",
    )


def test_a_scheme_that_quantizes_nothing_is_told_of() -> None:
    for found in (planned("llama", "iter_smooth"), planned("llama", RTN, scheme="float")):
        assert any("no linear is quantized" in note for note in found.notes)
        only(found)


# Widths.


def test_a_group_that_does_not_divide_is_refused_once_for_all_layers() -> None:
    only(
        planned("llama", RTN, scheme="w4a16-g64", target="modelslim"),
        "model.layers.0.mlp.down_proj and 2 more alike|group size 64 does not divide its width 96",
    )
    only(planned("llama-128", RTN, scheme="w4a16-g64", target="modelslim"))


def test_a_width_without_a_rotation_says_what_would_do() -> None:
    only(
        planned("llama", f"online_rotation,{RTN}", scheme="w4a4"),
        "down_proj and 2 more alike|width 96 splits into 8 x 12|exclude it",
    )
    hint = "o_proj and 2 more alike|splits its width 48 into 6 x 8|order 6|online_rotation{factor=random}"
    passes = "online_rotation{{enable_subgraph_type=ov, factor={}}},linear_quant"
    only(planned("smollm2", passes.format("hadamard"), scheme="w4a4"), hint)
    only(planned("smollm2", passes.format("random"), scheme="w4a4"))


def test_a_block_size_that_does_not_fit_names_the_width() -> None:
    only(
        planned("smollm2", f"quarot{{block_size=32}},{RTN}"),
        "rotate_residual|block_size=32 does not divide its width 48",
        "rotate_heads|v_proj and 2 more alike|does not divide its width 8",
    )
    only(planned("smollm2", f"quarot{{block_size=8}},{RTN}"))


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (
            "gemma2",
            "0.post_attention_layernorm multiplies by its gain|only linears|aten.add in model.layers.0 reads",
        ),
    ],
)
def test_a_stream_that_can_not_be_rotated_names_what_is_in_the_way(family: str, words: str) -> None:
    found = planned(family, f"quarot,{RTN}", scheme="w8a8", target="modelslim")
    only(found, f"residual stream|{words}|Leave quarot (rotate_residual) out")


@pytest.mark.parametrize(("tp", "copies"), [(1, {1}), (2, {2})])
def test_tensor_parallel_ranks_have_a_rotation_each(tp: int, copies: set[int]) -> None:
    found = planned("llama-128", f"online_rotation,{RTN}", scheme="w4a4", tp=tp)
    only(found)
    rotations = [n.meta["rotated"] for n in found.final.graph.nodes if "rotated" in n.meta]
    assert len(rotations) == 6
    assert {rotation.copies for rotation in rotations} == copies
    assert cost_of(found).tp_sizes == (tp,)
    assert f"tensor parallel:      {tp}\n" in plan_text(found)


def test_a_plan_says_over_how_many_ranks_its_result_loads() -> None:
    found = planned("llama", RTN)
    assert cost_of(found).tp_sizes == (1, 2, 4)
    assert "tensor parallel:      1, 2, 4\n" in plan_text(found)
    assert plan_json(found)["cost"]["tp_sizes"] == [1, 2, 4]


def test_ranks_that_do_not_divide_are_refused_with_those_that_do() -> None:
    only(planned("llama", RTN, tp=3), "--tp 3|4 heads|sizes that do: 1, 2, 4")


def test_a_bias_that_has_no_place_is_refused_with_the_pass_that_makes_it() -> None:
    only(
        planned("llama", f"iter_smooth{{symmetric=false}},{RTN}", scheme="w8a8"),
        "q_proj and 14 more alike|iter_smooth gives it a bias|make iter_smooth symmetric, or take w8a8-stat",
    )
    only(planned("llama", f"iter_smooth{{symmetric=false}},{RTN}", scheme="w8a8-static"))


def test_a_format_that_the_target_has_not_is_refused() -> None:
    only(planned("llama", RTN, scheme="w4a16"), "the server has no linear for W4A16|--target modelslim")
    only(planned("llama", RTN, scheme="w4a16", target="modelslim"))
    only(
        planned("llama-128", f"online_rotation,{RTN}", scheme="auto"),
        "o_proj and 5 more alike|online rotation is served before int4 linears only|w4a4",
    )


# What it prints, and what it costs.


PRINTED = "iter_smooth,quarot,online_rotation{enable_subgraph_type=up-down},linear_quant"


def test_the_printed_plan(snapshot: SnapshotAssertion) -> None:
    found = planned("qwen3-128", PRINTED, scheme="w4a4")
    only(found)
    assert plan_text(found) == snapshot
    assert plan_text(found) == plan_text(planned("qwen3-128", PRINTED, scheme="w4a4"))


def test_the_printed_plan_of_a_wrong_order(snapshot: SnapshotAssertion) -> None:
    passes = "quarot{online=true},iter_smooth{enable_subgraph_type=ov+norm-linear},linear_quant"
    assert plan_text(planned("qwen3-128", passes)) == snapshot


def test_the_plan_for_machines_says_the_same() -> None:
    found = planned("llama-128", "iter_smooth,quarot{online=true},linear_quant", scheme="w4a4")
    said = json.loads(json.dumps(plan_json(found)))
    assert [one["name"] for one in said["passes"]] == [step.what.name for step in found.steps]
    assert [len(one["sites"]) for one in said["passes"]] == [len(s.answer.rewrites) for s in found.steps]
    assert said["passes"][0]["options"]["alpha"] == 0.6
    assert said["cost"] == cost_of(found).numbers()
    assert said["cost"]["peak_bytes"] is None
    assert said["calibration"] is None
    assert said["problems"] == []
    smooth, online, rounded = said["passes"][0], said["passes"][-2], said["passes"][-1]
    assert smooth["layers"]["model.layers.1"] == {"up-down": 1, "ov": 1} == dict.fromkeys(smooth["found"], 1)
    assert [one["before"].rpartition(".")[2] for one in online["online"]] == ["o_proj", "down_proj"] * 3
    assert all(one["op"] in plan_text(found) for one in online["online"])
    assert rounded["schemes"] == {"W4A4": 21}
    assert said["blocks"] == 3


def test_the_plan_for_machines_says_how_calibration_runs() -> None:
    run = Run(16, 128, torch.float32, ("text.txt",))
    found = planned("llama-128", "iter_smooth,linear_quant", run=run)
    said = plan_json(found)
    assert said["calibration"] == {
        "needed": True, "samples": 16, "length": 128, "files": ["text.txt"], "compute_dtype": "float32",
        "microbatch_tokens": 1024,
    }  # fmt: skip
    assert said["cost"]["peak_bytes"] > 2**27
    assert "calibration:          16 x 128 tokens in float32\n" in plan_text(found)
    assert "peak memory:" in plan_text(found)
    assert "peak memory:" not in plan_text(found, cost=cost_of(found, peak=False))


@pytest.mark.usefixtures("uncertified")
def test_json_is_on_stdout_also_when_the_plan_can_not_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of("llama-128").save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--passes", "linear_quant,quarot", "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert len(said["problems"]) >= 1
    assert said["passes"][0]["name"] == "linear_quant"
    assert main(["plan", str(tmp_path / "none"), "--passes", "linear_quant", "--json"]) == 2
    told = capsys.readouterr()
    (why,) = json.loads(told.out)["problems"]
    assert "no such directory" in why
    assert why.splitlines()[0] in told.err


def test_bits_per_weight_count_the_scales() -> None:
    per_row = {"w8a8": 8, "w4a4": 4, "w8a16": 8}
    for scheme, bits in per_row.items():
        cost = cost_of(planned("llama-128", RTN, scheme=scheme))
        weights = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
        rows = 3 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
        assert cost.bits_per_weight == pytest.approx(bits + 32 * rows / weights)
    assert cost_of(planned("llama-128", "iter_smooth")).bits_per_weight == 16
    grouped = cost_of(planned("llama-128", RTN, scheme="w4a16-g64", target="modelslim"))
    assert grouped.bits_per_weight == pytest.approx(4 + 32 / 64)


def test_bytes_are_those_of_the_layout() -> None:
    found = planned("llama-128", RTN, scheme="w4a4")
    cost = cost_of(found)
    assert cost.disk_bytes == sum(spec.nbytes for spec in found.layout.specs.values())
    weights = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert cost.disk_bytes - cost.device_bytes == weights // 2
    assert cost.schemes == (("W4A4", 21),)


@pytest.fixture
def uncertified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture without its own certificate, which has its own tests."""
    monkeypatch.setattr("qc.compiler.compile.capture", functools.partial(capture, certify=False))


@pytest.mark.usefixtures("uncertified")
def test_a_directory_with_a_config_alone_can_be_planned(tmp_path: Path) -> None:
    config_of("llama-128").save_pretrained(tmp_path)
    found = plan_of(tmp_path, "iter_smooth,quarot,linear_quant")
    only(found)
    assert cost_of(found, peak=False) == cost_of(planned("llama-128", "iter_smooth,quarot,linear_quant"))


def test_a_plan_is_the_same_for_the_same_seed_and_not_for_another() -> None:
    def rotations(seed: int) -> set[Any]:
        found = planned("llama-128", "quarot,linear_quant", seed=seed)
        return {e.operand for s in found.steps for r in s.answer.rewrites for e in r.edits if r.basis}

    assert rotations(0) == rotations(0)
    assert not rotations(0) & rotations(1)


def test_floats_are_exported_in_the_models_dtype() -> None:
    assert planned("llama", RTN).dtype is torch.bfloat16


def test_a_plan_that_finds_nothing_says_what_is_there_instead() -> None:
    d = Drawing()
    x = d.value("x", 2, 3, 8)
    program = d.program(d.op(aten.gelu.default, d.opaque("blocks.0.box", x)))
    for passes in ("iter_smooth", "linear_quant", "fuse_norms,rotate_heads"):
        (problem,) = make_plan(program, passes, scheme="w8a8", target="modelslim").problems
        assert problem.startswith(
            "no pass of this plan finds anything in the model, whose blocks hold 1 other modules"
        )
        assert "qc show" in problem
