"""A rotation that is turned towards the data: never worse than it was, exact, only where there are data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc.compiler.compile import Options, plan
from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.recipe import read_recipe
from qc.compiler.spelling import passes_of
from qc.passes.adapt_residual import AdaptResidual
from qc.passes.procrustes import adapt, nearest_rotation, rounded
from tests.homes import Home, compiled, logits
from tests.plans import planned
from tests.programs import captured, relative
from tests.recipes import Written

LAOS_V2 = Path(__file__).parents[2] / "shared" / "recipes" / "laos-v2.yaml"


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_rotation(matrix: torch.Tensor) -> None:
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64))


@given(st.integers(0, 40), st.integers(1, 12))
def test_the_nearest_rotation_is_one_and_beats_others(seed: int, rank: int) -> None:
    product = (randn(12, rank, seed=seed) @ randn(rank, 12, seed=seed + 1)).double()
    found = nearest_rotation(product)
    assert_rotation(found)
    other, _ = torch.linalg.qr(randn(12, 12, seed=seed + 2).double())
    assert float((found * product).sum()) >= float((other * product).sum()) - 1e-9
    torch.testing.assert_close(float((found * product).sum()), float(torch.linalg.svdvals(product).sum()))


@given(st.integers(0, 40), st.integers(1, 8))
def test_directions_without_data_stay_where_they_are(seed: int, rank: int) -> None:
    basis, _ = torch.linalg.qr(randn(12, 12, seed=seed).double())
    seen = basis[:, :rank]
    product = seen @ randn(rank, rank, seed=seed + 1).double() @ seen.T
    found = nearest_rotation(product)
    torch.testing.assert_close(found @ basis[:, rank:], basis[:, rank:], atol=1e-6, rtol=0)


def test_fewer_rows_than_channels_give_the_same_answer_twice() -> None:
    """The reference tool's update is arbitrary outside the range of its data (spec/modelslim.md 2.11)."""
    rows = randn(16, 64)
    found, _, _ = adapt(rows, 4, 5)
    nudged, _, _ = adapt(rows * (1 + 1e-7 * randn(16, 64, seed=1)), 4, 5)
    assert_rotation(found)
    assert relative(nudged, found) < 1e-2


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_adapting_helps_and_never_hurts(bits: int, keeps_ones: bool) -> None:
    rows = randn(256, 32)
    found, before, after = adapt(rows, bits, 20, keeps_ones)
    assert_rotation(found)
    assert after < 0.97 * before
    size = rows.square().sum().sqrt()
    turned = rows @ found.float()
    assert float((turned - rounded(turned, bits)).square().sum().sqrt() / size) == pytest.approx(
        after, rel=1e-3
    )
    if keeps_ones:
        ones = torch.ones(32, dtype=torch.float64)
        torch.testing.assert_close(found @ ones, ones)


CHOSEN = [("llama", "up_proj"), ("gpt2", "c_fc"), ("phi3", "gate_up"), ("llama", ""), ("gpt2", "")]


@pytest.mark.broad
@pytest.mark.parametrize(("family", "layer"), CHOSEN)
def test_the_adapted_rotation_keeps_the_function(
    family: str, layer: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home(family), tmp_path / "out"
    chosen = f"layer_type={layer}, " if layer else ""
    passes = f"adapt_rotation{{{chosen}steps=4}},linear_quant"
    result = compiled(place, out, passes, scheme="w8a8", target="modelslim")
    assert result.journal.worst < 1e-11
    (learned,) = (entry for entry in result.journal.entries if "survey" in entry)
    assert learned["measures"]["error after"] < learned["measures"]["error before"]
    assert learned["measures"]["rows"] > 0
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, out))
    assert 1e-4 < relative(got, want) < 0.1


def test_linears_are_chosen_by_dataflow_where_no_name_is_given() -> None:
    for family, part in (("llama", "gate_proj"), ("phi3", "gate_up_proj")):
        chosen = AdaptResidual().norms(captured(family))
        assert len(chosen) == len(captured(family).blocks)
        assert all(part in name or "up_proj" in name for name in chosen)
    assert len(AdaptResidual().norms(captured("gpt2"))) == 2 * len(captured("gpt2").blocks)


def test_a_layer_type_that_no_linear_has_is_a_problem() -> None:
    found = planned("llama", "adapt_rotation{layer_type=c_fc}", scheme="float", target="modelslim").problems
    assert any("layer_type=c_fc" in problem and "up_proj" in problem for problem in found)


@pytest.mark.parametrize("options", ["steps=0", "max_samples=0", "quant_dtype=int3", "block_size=3"])
def test_options_out_of_range_are_refused(options: str) -> None:
    with pytest.raises(Refused, match=options.partition("=")[0]):
        passes_of(f"adapt_rotation{{{options}}}")


STAGES = """apiversion: modelslim_v1
spec:
  prior:
    - process:
        - {type: adapt_rotation, stage: 1, steps: 7, quant_dtype: int8, layer_type: [gate_proj]}
  process:
    - {type: adapt_rotation, stage: 2, online: true, max_tp_size: 2, down_proj_online_layers: [0]}
"""


def test_two_stages_of_a_recipe_are_one_plan(written: Written) -> None:
    recipe = read_recipe(written(STAGES))
    assert [str(one) for one in recipe.passes] == [
        "fuse_norms", "adapt_residual{steps=7, quant_dtype=int8, layer_type=gate_proj}", "rotate_heads",
        "quarot_online{max_tp_size=2, down_proj_online_layers=0}",
    ]  # fmt: skip


def test_a_second_stage_alone_is_quarot_and_says_so(written: Written) -> None:
    text = "apiversion: modelslim_v1\nspec:\n  process:\n    - {type: adapt_rotation, stage: 2}\n"
    recipe = read_recipe(written(text))
    assert [one.name for one in recipe.passes] == ["fuse_norms", "rotate_residual", "rotate_heads"]
    assert any("no stage 1" in note for note in recipe.notes)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("stage: 1, ", ""), "line 5: adapt_rotation has a stage"),
        (("stage: 1", "stage: 2"), "line 5: adapt_rotation: stage 2 belongs into spec.process"),
        (("stage: 2", "stage: 1"), "line 7: adapt_rotation: stage 1 belongs into spec.prior"),
        (("steps: 7", "online: true"), "line 5: adapt_rotation: online belongs to stage 2"),
        (("steps: 7", "step: 7"), "line 5: unknown option of adapt_rotation 'step'; did you mean steps"),
        (("steps: 7", "steps: 0"), "steps=0"),
        (("int8", "int3"), "line 5: "),
        (("steps: 7", "block_size: 8"), ""),
    ],
)
def test_stages_that_are_wrong_are_refused_with_their_line(
    change: tuple[str, str], why: str, written: Written
) -> None:
    file = written(STAGES.replace(*change))
    if not why:
        assert "block_size=8" in str(read_recipe(file).passes[1])
        return
    with pytest.raises(Refused) as refused:
        read_recipe(file)
    assert why in str(refused.value)


@pytest.mark.skipif(not LAOS_V2.is_file(), reason="the recipe lies beside the project, and is not here")
def test_the_newer_laos_recipe_runs_as_it_is() -> None:
    found = plan(
        captured("qwen3"), read_recipe(LAOS_V2), Options(calib=(Path(__file__),), samples=4, length=16)
    )
    assert found.problems == ()
    assert [step.what.name for step in found.steps] == [
        "fuse_norms",
        "adapt_residual",
        "rotate_heads",
        "autoround",
    ]


def test_a_first_stage_that_nothing_applies_is_left_out_and_told(written: Written) -> None:
    recipe = read_recipe(written(STAGES.replace("type: adapt_rotation, stage: 2", "type: quarot")))
    assert not any(one.name == "adapt_residual" for one in recipe.passes)
    assert any("no second stage" in note for note in recipe.notes)
