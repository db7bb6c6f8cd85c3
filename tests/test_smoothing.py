"""Smoothing passes: what they search for is found, what they rewrite keeps the function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qc.compiler.contract import Setting
from qc.compiler.edit import Edit, Verb
from qc.compiler.operand import Quantize, Slot, Statistic, Vector
from qc.compiler.pattern import Site
from qc.compiler.scheme import W4A16_G64, W8A8, LinearScheme, Rule
from qc.compiler.view import BlockView
from qc.passes.autoround import AutoRound
from qc.passes.awq import Awq
from qc.passes.flex_awq_ssz import FlexAwqSsz
from qc.passes.flex_smooth_quant import FlexSmoothQuant
from qc.passes.iter_smooth import IterSmooth
from qc.passes.linear_quant import LinearQuant
from qc.passes.quantizers import quantizer_of
from qc.passes.scale_trial import GRID, Trial
from qc.passes.smooth_formula import smooth_scale
from qc.passes.smooth_quant import SmoothQuant
from qc.passes.smoothing import Smoothing, Subgraph
from tests.homes import Home, compiled
from tests.plans import planned
from tests.programs import captured

SETTING = Setting(scheme=None, roles={})
PASSES = [SmoothQuant, IterSmooth, FlexSmoothQuant, FlexAwqSsz, Awq]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def subgraph(
    rows: Tensor, weight: Tensor, groups: tuple[int, int] | None = None, repeat: int = 1, planned: Any = None
) -> Subgraph:
    """A reader of what ``rows`` are a sample of."""
    slot = Slot("w/norm-linear/scale", (rows.shape[1] // repeat,), (Statistic("rows", "r"),))
    edit = Edit(Verb.SCALE_IN, Site("r"), Vector(slot, groups=groups, repeat=repeat))
    view = BlockView("block", {"r.weight": weight}, {}, torch.bfloat16, 0, planned=planned or {})
    observed = {"rows": rows, "absmax": rows.abs().amax(0), "absmean": rows.abs().mean(0)}
    return Subgraph(view, (edit,), observed)


def with_outliers(channels: int = 32) -> tuple[Tensor, Tensor]:
    rows, weight = randn(128, channels), randn(24, channels, seed=1)
    rows[:, 3] *= 60
    rows[:, 7] *= 20
    return rows, weight


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("beta", [None, 0.4])
def test_the_flexible_search_finds_the_best_of_its_grids(alpha: float | None, beta: float | None) -> None:
    found = subgraph(*with_outliers())
    trial = Trial(found, W8A8)
    scale = FlexSmoothQuant(alpha=alpha, beta=beta).scale(found)
    stated = [
        smooth_scale(found, a, 1 - a if beta is None else beta) for a in (GRID if alpha is None else (alpha,))
    ]
    assert trial.error(scale) <= min(trial.error(one) for one in stated) + 1e-12
    plain = trial.error(torch.ones(32))
    assert trial.error(scale) < plain / 2
    if alpha is not None and beta is not None:
        assert torch.equal(scale, smooth_scale(found, alpha, beta))


def test_a_search_that_nothing_can_be_gained_from_changes_little() -> None:
    rows, weight = randn(128, 32), randn(24, 32, seed=1)
    found = subgraph(rows, weight)
    trial = Trial(found, W8A8)
    assert trial.error(FlexSmoothQuant().scale(found)) <= trial.error(torch.ones(32)) * 1.001


def test_awq_rounds_active_channels_finely() -> None:
    rows, weight = with_outliers(64)
    found = subgraph(rows, weight)
    scale = Awq(weight_qconfig="w4a16-g64").scale(found)
    trial = Trial(found, LinearScheme(W4A16_G64.weight))
    assert trial.error(scale) < trial.error(torch.ones(64)) / 1.5
    assert int(scale.argmax()) == 3
    assert float(scale.max() * scale.min()) == pytest.approx(1, abs=1e-4)


def test_flex_awq_asks_the_quantizer_that_will_be_used() -> None:
    rows, weight = with_outliers(64)
    operand = Quantize(W4A16_G64, Slot("r/integers", (24, 64)), "ssz")
    by_plan = subgraph(rows, weight, planned={"r": operand})
    assert torch.equal(
        FlexAwqSsz().scale(by_plan), FlexAwqSsz(qconfig="w4a16-g64@ssz").scale(subgraph(rows, weight))
    )
    chosen = quantizer_of(None, "qconfig", operand)
    assert (chosen.scheme, chosen.weight_method) == (W4A16_G64, "ssz")
    assert quantizer_of(None, "qconfig", None).scheme == W8A8
    rule = Rule(scheme=W4A16_G64, weight_method="clip")
    assert quantizer_of(rule, "qconfig", operand).weight_method == "clip"


@pytest.mark.parametrize(
    "one", [FlexSmoothQuant(), FlexAwqSsz(), Awq(), IterSmooth(), FlexAwqSsz(group_method="mean")]
)
def test_query_heads_that_share_a_key_head_share_its_scale(one: Smoothing) -> None:
    rows, weight = with_outliers(32)
    found = subgraph(rows, weight, groups=(2, 4), repeat=4)
    scale = one.scale(found)
    assert scale.shape == (8,)
    assert bool((scale > 0).all())
    spread = found.in_readers(scale)
    assert torch.equal(spread.view(2, 4, 4)[:, 0], spread.view(2, 4, 4)[:, 3])


@pytest.mark.parametrize("one", [SmoothQuant(), IterSmooth(), FlexSmoothQuant(), FlexAwqSsz()])
def test_a_channel_that_was_never_active_is_left_alone(one: Smoothing) -> None:
    rows, weight = with_outliers(32)
    rows[:, 5] = 0
    assert one.scale(subgraph(rows, weight))[5] == 1


WRONG = [
    (SmoothQuant, {"alpha": 1.5}, "alpha=1.5"),
    (FlexSmoothQuant, {"beta": -0.1}, "beta=-0.1"),
    (FlexAwqSsz, {"alpha": 2.0}, "alpha=2.0"),
    (FlexAwqSsz, {"qconfig": "w5a5"}, "qconfig=w5a5"),
    (FlexAwqSsz, {"qconfig": "auto"}, "one format for all linears"),
    (Awq, {"weight_qconfig": "w4a16@gptqq"}, "weight_qconfig=w4a16@gptqq"),
    (Awq, {"n_grid": 0}, "n_grid=0"),
    (Awq, {"enable_subgraph_type": ("norm-linar",)}, "enable_subgraph_type=norm-linar"),
    (IterSmooth, {"group_method": "median"}, "group_method=median"),
]


@pytest.mark.parametrize(("cls", "options", "told"), WRONG)
def test_options_that_are_wrong_are_named(cls: type[Smoothing], options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cls(**options)


def test_smooth_quant_takes_norms_alone() -> None:
    answer = SmoothQuant().rewrite(captured("llama"), SETTING)
    assert {rewrite.pattern for rewrite in answer.rewrites} == {"norm-linear"}
    assert len(answer.rewrites) == 2 * len(captured("llama").blocks)
    found = planned("llama", "smooth_quant,quarot", scheme="float", target="modelslim").problems
    assert any("its norm fusion takes the gain back" in problem for problem in found)


@pytest.mark.broad
@pytest.mark.parametrize(
    ("passes", "family"),
    [("smooth_quant", "llama"), ("smooth_quant{symmetric=false}", "opt"), ("flex_smooth_quant", "phi3"),
     ("flex_smooth_quant", "mixtral"), ("awq", "llama"), ("awq", "opt"), ("flex_awq_ssz", "phi3")],
)  # fmt: skip
def test_every_smoothing_is_proved(
    passes: str, family: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    result = compiled(
        home(family), tmp_path / "out", f"{passes},linear_quant", scheme="w8a8", target="modelslim"
    )
    assert result.journal.proofs > 0
    assert result.journal.worst < 1e-12


def test_methods_that_a_quantizer_has_no_use_for_are_refused() -> None:
    with pytest.raises(ValueError, match="autoround finds scales by autoround, not by ssz"):
        AutoRound(strategies=("w4a16@ssz",))
    with pytest.raises(ValueError, match="linear_quant finds scales by minmax, ssz, clip, not by gptq"):
        LinearQuant(strategies=(Rule(scheme=W8A8, weight_method="gptq"),))
    with pytest.raises(ValueError, match="W8A8 has no fixed range"):
        LinearQuant(strategies=("w8a8@histogram",))
    found = planned("llama", "linear_quant{act_method=histogram}", scheme="w8a8", target="modelslim").problems
    assert any("no linear that it takes has a static activation" in one for one in found)
