"""The scales that iter_smooth solves, on numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qc.compiler.contract import Rewrite, Setting
from qc.compiler.program import Program
from qc.compiler.view import BlockView
from qc.passes.iter_smooth import IterSmooth
from tests.programs import Drawing

SETTING = Setting(scheme=None, roles={})


def drawn(heads: int = 4, kv: int = 2) -> Program:
    """A norm read by q and v, an attention with one channel per head, and its reader o."""
    d = Drawing()
    n = d.norm("norm", d.embedding("embed", 11, 2))
    q, k, v = (d.linear(name, n, size) for name, size in (("q", heads), ("k", kv), ("v", kv)))
    out = d.attention(d.heads(q, heads), d.heads(k, kv), d.heads(v, kv))
    return d.program(d.linear("o", d.flat(out), 3))


def rewrite_of(options: dict[str, Any], name: str) -> tuple[Rewrite, IterSmooth]:
    one = IterSmooth(enable_subgraph_type=(name,), **options)
    (rewrite,) = one.rewrite(drawn(), SETTING).rewrites
    return rewrite, one


def solved(name: str, weights: dict[str, Tensor], statistic: Tensor, **options: Any) -> dict[str, Tensor]:
    """Slots by kind, for weights by module and what was observed at the first reader."""
    rewrite, one = rewrite_of(options, name)
    (need,) = {need for slot in rewrite.slots for need in slot.needs}
    tensors = {f"{module}.weight": weight for module, weight in weights.items()}
    view = BlockView("block", tensors, {need: statistic}, torch.bfloat16, 0)
    return {slot.name.rpartition("/")[2]: value for slot, value in one.solve(rewrite, view).items()}


def norm_readers(*largest: float) -> dict[str, Tensor]:
    """Readers of the norm whose largest weights per channel are these, in different rows, some negative."""
    q = torch.zeros(4, len(largest))
    q[0], q[1] = torch.tensor(largest) / 2, -torch.tensor(largest)
    return {"q": q, "k": q[:2] / 3, "v": -q[:2] / 4}


def test_the_worked_example() -> None:
    found = solved("norm-linear", norm_readers(0.5, 2.0), torch.tensor([8.0, 1.0]), alpha=0.9)
    assert found["scale"].tolist() == pytest.approx([6.9644, 0.9330], abs=1e-4)


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, [8.0, 1.0]), (0.0, [2.0, 0.5]), (0.5, [4.0, 0.7071])])
def test_alpha_moves_between_weights_and_activations(alpha: float, expected: list[float]) -> None:
    found = solved("norm-linear", norm_readers(0.5, 2.0), torch.tensor([8.0, 1.0]), alpha=alpha)
    assert found["scale"].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_scale_is_not_smaller_than_the_least_and_a_dead_channel_is_left_alone() -> None:
    found = solved(
        "norm-linear", norm_readers(1.0, 1.0), torch.tensor([1e-9, 0.0]), alpha=1.0, scale_min=1e-3
    )
    assert found["scale"].tolist() == pytest.approx([1e-3, 1.0])


def test_a_channel_without_weights_has_a_finite_scale() -> None:
    found = solved("norm-linear", norm_readers(0.0, 1.0), torch.tensor([1.0, 1.0]))
    assert bool(torch.isfinite(found["scale"]).all())


def test_a_shift_is_the_middle_of_the_range_and_the_scale_that_of_what_is_left() -> None:
    low, high = torch.tensor([-1.0, 2.0]), torch.tensor([5.0, 4.0])
    found = solved(
        "norm-linear", norm_readers(1.0, 1.0), torch.stack([low, high]), alpha=1.0, symmetric=False
    )
    assert found["shift"].tolist() == [2.0, 3.0]
    assert found["scale"].tolist() == [3.0, 1.0]


OUTPUTS = {"o": torch.ones(3, 4)}
SEEN = torch.tensor([1.0, 3.0, 5.0, 7.0])


def test_query_heads_of_a_group_are_joined_by_the_largest() -> None:
    assert solved("ov", OUTPUTS, SEEN, alpha=1.0)["scale"].tolist() == [3.0, 7.0]


def test_or_by_the_mean_of_their_scales() -> None:
    found = solved("ov", OUTPUTS, SEEN, alpha=1.0, group_method="mean")
    assert found["scale"].tolist() == [2.0, 6.0]


def test_values_are_not_shifted() -> None:
    rewrite, _ = rewrite_of({"symmetric": False}, "ov")
    assert [slot.name for slot in rewrite.slots] == ["v/ov/scale"]
