"""``--fallback L5``: the linears whose rounding costs most stay float, found on the calibration data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qc.compiler.capture import capture
from qc.compiler.compile import Options
from qc.compiler.errors import Refused
from qc.compiler.fallback import level
from qc.compiler.roles import read_together, roles_of
from qc.compiler.scheme import W8A8, Rule, Scheme
from qc.compiler.spelling import passes_of
from tests.homes import Home, compiled
from tests.plans import planned


def test_levels() -> None:
    assert [level(text) for text in ("L0", "L5", "7")] == [0, 5, 7]
    for text in ("five", "L", "-1"):
        with pytest.raises(Refused, match="such as L5"):
            Options(fallback=text)


@pytest.mark.broad
def test_the_worst_linear_stays_float(home: Callable[[str], Home], tmp_path: Path) -> None:
    place = home("llama")
    (file,) = place.path.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj"
    tensors[f"{name}.weight"][:, 0] *= 300  # one huge weight per row leaves four bits for nothing else,
    tensors["model.layers.1.mlp.up_proj.weight"][0] /= 3000  # and what it is multiplied by is next to nothing
    (tmp_path / "model").mkdir()
    for other in place.path.iterdir():
        (tmp_path / "model" / other.name).write_bytes(other.read_bytes())
    save_file(tensors, tmp_path / "model" / file.name, metadata={"format": "pt"})
    spoiled = Home(tmp_path / "model", capture(tmp_path / "model", certify=False), place.text)
    result = compiled(
        spoiled, tmp_path / "out", "linear_quant", scheme="w4a4", target="modelslim", fallback="L1"
    )
    quantized = {str(n.target) for n in result.plan.final.graph.nodes if "scheme" in n.meta}
    assert name not in quantized
    assert len(quantized) == 7 * len(spoiled.program.blocks) - 1
    assert any(note.startswith(f"fallback L1: {name} stay float") for note in result.plan.notes)
    assert load_file(next((tmp_path / "out").glob("*.safetensors")))[f"{name}.weight"].dtype == torch.bfloat16


def test_a_plan_without_a_quantizer_has_nothing_to_fall_back_from(
    home: Callable[[str], Home], tmp_path: Path
) -> None:
    with pytest.raises(Refused, match="no pass of this plan quantizes"):
        compiled(
            home("llama"), tmp_path / "out", "iter_smooth", scheme="float", target="modelslim", fallback="L2"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.broad
@pytest.mark.parametrize("passes", ["linear_quant", "autoround{include=*.gate_proj+*.up_proj,iters=1},gptq"])
def test_linears_that_a_server_runs_as_one_stay_float_together(
    passes: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    result = compiled(
        home("llama"), tmp_path / "out", passes, scheme="w4a4", target="vllm-ascend", fallback="L5"
    )
    quantized = {str(n.target) for n in result.plan.final.graph.nodes if "scheme" in n.meta}
    together = read_together(result.plan.program)
    left = {name for name in together if name not in quantized and name.startswith("model.layers.")}
    parts = [{other for other in together[name] if other in left} for name in left]
    assert len(set(map(frozenset, parts))) == 5
    assert all(part == set(together[name]) for name, part in zip(left, parts, strict=True))


@pytest.mark.broad
def test_experts_are_never_left_float_alone(home: Callable[[str], Home], tmp_path: Path) -> None:
    result = compiled(
        home("mixtral"), tmp_path / "out", "linear_quant", scheme="w8a8", target="vllm-ascend", fallback="L3"
    )
    (told,) = (note for note in result.plan.notes if note.startswith("fallback L3: "))
    left = set(told.removeprefix("fallback L3: ").partition(" stay float")[0].split(", "))
    assert left
    assert not left & roles_of(result.plan.program)["expert"]


EXPERTS = Scheme("experts", (Rule(include=("*experts*",), scheme=W8A8),))


@pytest.mark.parametrize(
    ("family", "scheme", "text", "why"),
    [
        ("llama", "w8a8", "L12", "12 places.*one at least has to stay quantized; give at most L11"),
        ("llama", "w8a8", "L999", "give at most L11"),
        ("mixtral", EXPERTS, "L1", "0 places besides experts; give at most L0"),
    ],
)
def test_more_than_there_is_is_refused(
    family: str, scheme: str | Scheme, text: str, why: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=why):
        compiled(
            home(family), tmp_path / "out", "linear_quant", scheme=scheme, target="modelslim", fallback=text
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.broad
@pytest.mark.parametrize("scope", ["per_head", "per_token"])
def test_the_worst_attention_stays_float(scope: str, home: Callable[[str], Home], tmp_path: Path) -> None:
    place = home("llama")
    (file,) = place.path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.v_proj.weight"][0] *= 1000  # one channel takes the grid of its head
    (tmp_path / "model").mkdir()
    for other in place.path.iterdir():
        (tmp_path / "model" / other.name).write_bytes(other.read_bytes())
    save_file(tensors, tmp_path / "model" / file.name, metadata={"format": "pt"})
    spoiled = Home(tmp_path / "model", capture(tmp_path / "model", certify=False), place.text)
    passes = f"fa3_quant{{fa_amp=1, fa_q=float, fa_k=float, fa_v={scope}}}"
    result = compiled(spoiled, tmp_path / "out", passes, scheme="float", target="modelslim")
    taken = {rewrite.where for step in result.plan.steps for rewrite in step.answer.rewrites}
    assert len(taken) == len(place.program.blocks) - 1
    assert "model.layers.1.self_attn" not in taken
    assert any(n.startswith("fa_amp=1: model.layers.1.self_attn stay float") for n in result.plan.notes)


def test_fa_amp_leaves_something_to_quantize() -> None:
    found = planned("llama", "fa3_quant{fa_amp=9}", scheme="float", target="modelslim").problems
    assert any("fa_amp=9 leaves none" in problem for problem in found)
    with pytest.raises(Refused, match="fa_amp=-1"):
        passes_of("fa3_quant{fa_amp=-1}")


@pytest.mark.broad
@pytest.mark.parametrize(
    ("passes", "scheme"),
    [
        ("flatquant{iters=1},gptq", "w4a4"),
        ("online_rotation,linear_quant", "w4a4"),
        ("svd_res{rank=2},linear_quant", "w8a8"),
        ("quarot{online=true},linear_quant", "w4a4"),
        ("fa3_quant,outlier_channels,linear_quant", "w8a8"),
    ],
)
def test_what_stands_beside_integers_alone_leaves_the_same_linears(
    passes: str, scheme: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    """A linear that falls back to float keeps no online transform and no branch, which no target has there."""
    place = home("llama-128")
    result = compiled(place, tmp_path / "out", passes, scheme=scheme, target="modelslim", fallback="L3")
    left = [str(n.target) for n in result.plan.final.graph.nodes if n.meta.keys() & {"rotated", "branch"}]
    quantized = {str(n.target) for n in result.plan.final.graph.nodes if "scheme" in n.meta}
    assert len(quantized) < 7 * len(place.program.blocks)
    assert left
    assert set(left) <= quantized
