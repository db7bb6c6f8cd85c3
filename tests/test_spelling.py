"""What a user writes is understood, or refused with what was probably meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from qc.compiler.cli import main
from qc.compiler.errors import Refused
from qc.compiler.plan_text import plan_text
from qc.compiler.scheme import FLOAT, W4A4, Rule
from qc.passes.autoround import AutoRound
from qc.passes.iter_smooth import IterSmooth
from qc.passes.linear_quant import LinearQuant
from qc.passes.presets import quarot
from tests.plans import RTN, only, planned, schemes
from tests.programs import captured

GLOBS = [
    (
        "iter_smooth{include=*.up_porj}",
        "iter_smooth|include '*.up_porj' matches nothing|did you mean '*.up_proj'?",
    ),
    ("iter_smooth{exclude=*.v_prj}", "iter_smooth|exclude '*.v_prj'|did you mean '*.v_proj'?"),
    (
        "iter_smooth{include=*.q_proj}",
        "include '*.q_proj' matches modules, but none that could be chosen|up_proj",
    ),
    ("iter_smooth{include=*layernorm, enable_subgraph_type=ov}", "matches modules, but none"),
    ("online_rotation{include=*.up_proj}", "online_rotation: include|matches modules, but none|o_proj"),
]


@pytest.mark.parametrize(("passes", "words"), GLOBS)
def test_a_glob_that_chooses_nothing_is_an_error(passes: str, words: str) -> None:
    only(planned("llama-128", f"{passes},{RTN}", scheme="w4a4"), words)


@pytest.mark.parametrize(
    ("glob", "count"),
    [("lm_head", 0), ("*.down_proj", 3), ("*.{0,2}.*", 14), ("*.1.self_attn.o_proj", 1), ("*", 21)],
)  # fmt: skip
def test_globs_choose_linears(glob: str, count: int) -> None:
    found = planned("llama", (LinearQuant(include=(glob,)),))
    assert len(schemes(found)) == count
    assert bool(found.problems) == (count == 0)


def test_strategies_give_a_pass_formats_of_its_own() -> None:
    spelled = "autoround{strategies=w4a4:*.{up,gate}_proj|*.0.*.o_proj + float:*.1.* + w8a8, exclude=*.2.*}"
    found = schemes(planned("llama-128", spelled, scheme="float"))
    gated = {f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("up", "gate")}
    assert {name for name, scheme in found.items() if scheme == "W4A4"} == {
        *gated,
        "model.layers.0.self_attn.o_proj",
    }
    assert {name.split(".")[2] for name, scheme in found.items() if scheme == "W8A8"} == {"0"}
    same = AutoRound(
        strategies=(
            Rule(include=("*.{up,gate}_proj", "*.0.*.o_proj"), scheme=W4A4),
            Rule(include=("*.1.*",), scheme=FLOAT),
            "w8a8",
        ),
        exclude=("*.2.*",),
    )
    assert schemes(planned("llama-128", [same])) == found
    only(
        planned("llama", "autoround{strategies=w4a4:*.up_porj+w8a8}"),
        "strategies: '*.up_porj' matches nothing",
    )
    with pytest.raises(Refused, match="unknown scheme 'w4a5'"):
        planned("llama", "autoround{strategies=w4a5:*.up_proj}")


REFUSED = {
    "iter_smoth,linear_quant": "unknown pass 'iter_smoth'; did you mean iter_smooth or kv_smooth?",
    "quarto": "unknown pass 'quarto'; did you mean quarot?",
    "iter_smooth{alhpa=0.5}": "unknown option of iter_smooth 'alhpa'; did you mean alpha?",
    "quarot{onlin=true}": "unknown option of quarot 'onlin'; did you mean online?",
    "fuse_norms{x=1}": "fuse_norms has no options",
    "iter_smooth{alpha=1.5}": "alpha=1.5: it must be between 0 and 1",
    "iter_smooth{alpha=nan}": "between 0 and 1",
    "iter_smooth{alpha=high}": "alpha=high}: it must be a number",
    "iter_smooth{scale_min=0}": "scale_min=0.0: it must be positive",
    "iter_smooth{scale_min=inf}": "scale_min=inf",
    "iter_smooth{symmetric=no}": "it must be true or false",
    "iter_smooth{group_method=median}": "it must be one of max, mean",
    "iter_smooth{enable_subgraph_type=ov+qk}": "enable_subgraph_type=qk: types are up-down, ov",
    "iter_smooth{alpha}": "has no value; write alpha=VALUE",
    "iter_smooth{alpha=0.5, alpha=0.6}": "given twice",
    "iter_smooth{alpha=0.5": "a brace is not closed",
    "iter_smooth}alpha=0.5{": "braces do not pair up",
    "iter_smooth{alpha=0.5}x": "something after its closing brace",
    "quarot{block_size=6}": "block_size=6: it must be -1 or a power of 2",
    "online_rotation{factor=walsh}": "it must be one of hadamard, random",
    "iter_smoothalpha=0.5": "the shell has expanded",
    "": "no passes were given",
    " , ": "no passes were given",
}


@pytest.mark.parametrize("passes", REFUSED)
def test_a_misspelled_list_is_refused_with_what_was_meant(passes: str) -> None:
    with pytest.raises(Refused) as refused:
        planned("llama", passes)
    assert REFUSED[passes] in str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "w4a5"}, "unknown scheme 'w4a5'; did you mean w4a8 or w4a4"),
        ({"target": "vllm-ascent"}, "unknown target 'vllm-ascent'; did you mean vllm-ascend?"),
    ],
)
def test_an_unknown_name_is_refused_with_what_was_meant(options: dict[str, str], words: str) -> None:
    with pytest.raises(Refused) as refused:
        planned("llama", RTN, **options)
    assert words in str(refused.value)


def test_spelling_options_and_giving_values_are_the_same() -> None:
    types = "enable_subgraph_type=ov+norm-linear"
    text = f"iter_smooth{{alpha=0.7, symmetric=false, {types}, include=*.v_proj+*norm}},quarot"
    found = planned("llama", text)
    first = IterSmooth(
        alpha=0.7, symmetric=False, enable_subgraph_type=("ov", "norm-linear"), include=("*.v_proj", "*norm")
    )
    assert [step.what for step in found.steps] == [first, *quarot()]
    spelled = [str(step.what) for step in found.steps]
    assert [step.what for step in planned("llama", spelled).steps] == [step.what for step in found.steps]
    assert any(note == "quarot is fuse_norms, rotate_residual, rotate_heads" for note in found.notes)


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


def test_plan_exits_with_0_or_2_and_prints_either_way(command: Any) -> None:
    status, out, err = command("plan", "llama-128", "--passes", "iter_smooth,quarot,linear_quant")
    assert (status, err) == (0, "")
    for line in plan_text(planned("llama-128", "iter_smooth,quarot,linear_quant")).splitlines():
        assert line in out.splitlines()
    assert "peak memory:          about " in out
    assert "calibration:          32 x 512 tokens in " in out
    status, out, _ = command("plan", "llama-128", "--passes", "linear_quant,quarot")
    assert status == 2
    assert "problems (3):" in out
    status, out, _ = command("plan", "llama-128", "--passes", "linear_quant", "--json", "--tp", "2")
    assert status == 0
    assert json.loads(out)["tp"] == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--passes", "iter_smoothalpha=0.7,quarot", "iter_smoothscale_min=1"), "expanded the braces"),
        (("--passes", "iter_smoothalpha=0.7"), "the shell has expanded"),
        (("--passes", "linear_quant", "more"), "unexpected words: more"),
        (("--passes", "linear_quant", "--tp", "0"), "--tp 0"),
        (("--passes", "linear_quant", "--samples", "0"), "--samples 0"),
        (("--passes", "linear_quant", "--dtype", "float16"), "--dtype float16: it is auto, bfloat16"),
        (("--passes", "linear_quant", "--device", "npu"), "--device npu"),
        (("--passes", "linear_quant", "--sheme", "w8a8"), "unrecognized arguments: --sheme"),
        (("--passes", "linear_quant", "--scheme", "w9"), "unknown scheme 'w9'"),
        (("--passes", "linear_qaunt"), "did you mean linear_quant"),
    ],
)  # fmt: skip
def test_bad_words_exit_with_2_and_say_what_is_wrong(command: Any, argv: tuple[str, ...], words: str) -> None:
    status, out, err = command("plan", "llama", *argv)
    assert status == 2
    assert words in err
    assert out == ""
    assert "Traceback" not in err
