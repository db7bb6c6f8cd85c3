"""SpQR: single weights in float, chosen for what the others gain; stored as a sparse matrix, counted and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc.compiler.cost import cost_of
from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.scheme import Int
from qc.compiler.spelling import passes_of
from qc.compiler.verify import verify
from qc.passes.column_rounding import gptq, inverse_diagonal
from qc.passes.outlier_search import outlier_mask
from qc.passes.weight_scale import weight_grid
from qc.runtime.linear import IntegerLinear
from qc.runtime.outlier_weights import CSR, OutlierWeights, to_csr
from qc.runtime.quantize import dequantize
from qc.runtime.sparse_rows import sparse
from tests.homes import Home, compiled, logits, tensors_of
from tests.plans import planned
from tests.programs import relative


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**20))
def test_what_is_stored_is_what_was_chosen(out: int, width: int, seed: int) -> None:
    weight, mask = randn(out, width, seed=seed), randn(out, width, seed=seed + 1) > 0.5
    stored = to_csr(mask, weight)
    beside = OutlierWeights(int(mask.sum()))
    shapes = {leaf: (t.dtype, tuple(t.shape)) for leaf, t in stored.items()}
    assert shapes == beside.tensors(width, out, torch.float32)
    assert OutlierWeights.of_shapes({leaf: tuple(t.shape) for leaf, t in stored.items()}) == beside
    assert all(not beside.wrong(leaf, stored[leaf], width) for leaf in CSR)
    assert torch.equal(sparse(*(stored[leaf] for leaf in CSR), in_features=width).to_dense(), weight * mask)
    x = randn(2, 3, width, seed=seed)
    torch.testing.assert_close(beside.product(x, stored.__getitem__), x @ (weight * mask).T)


def test_a_start_or_a_column_that_cannot_be_is_told() -> None:
    beside = OutlierWeights(3)
    assert "in order" in beside.wrong("outlier_start", torch.tensor([0, 2, 1, 3]), 8)
    assert "end at 3" in beside.wrong("outlier_start", torch.tensor([0, 1, 2]), 8)
    assert "0 to 7" in beside.wrong("outlier_column", torch.tensor([0, 8, 1]), 8)


@pytest.mark.parametrize("format", [Int(4, "group", group=16, symmetric=False), Int(4, "channel")])
def test_planted_outliers_are_found_and_help_the_others(format: Int) -> None:
    weight, x = randn(24, 64), randn(512, 64, seed=1) @ randn(64, 64, seed=2)
    planted = torch.arange(24) * 64 + (torch.arange(24) * 37) % 64  # one in every row
    weight.view(-1)[planted] = 8.0
    hessian = x.T @ x / len(x)
    mask = outlier_mask(weight, format, torch.float32, 1 / inverse_diagonal(hessian, 0.01), 40)
    assert int(mask.sum()) == 40
    assert bool(mask.view(-1)[planted].all())
    errors = []
    for outliers in (None, mask):
        kept = weight if outliers is None else weight.masked_fill(outliers, 0)
        scale, offset = weight_grid(kept, format, torch.float32, "clip", hessian.diagonal())
        integers, compensated = gptq(weight, scale, hessian, 4, offset=offset, outliers=outliers)
        got = dequantize(integers, scale, offset)
        if outliers is not None:
            assert not got[outliers].any()
            got = got + compensated * outliers
        errors.append(float((x @ (got - weight).T).square().mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.broad
@pytest.mark.parametrize(("family", "scheme"), [("llama", "w4a16-g32-asym"), ("gpt2", "w8a16")])
def test_it_beats_gptq_and_loads(
    family: str, scheme: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, errors = home(family), []
    want = logits(load(place.path, dtype=torch.float32))
    for passes in ("gptq", "spqr{outliers=0.05}"):
        out = tmp_path / passes[:4]
        compiled(place, out, passes, scheme=scheme, target="modelslim")
        errors.append(relative(logits(load(out, dtype=torch.float32)), want))
    assert errors[1] < 0.9 * errors[0]
    stored, types = tensors_of(out), json.loads((out / "quant_model_description.json").read_text())
    starts = [name for name in stored if name.endswith(".outlier_start")]
    for name in starts:
        prefix = name.removesuffix(".outlier_start")
        assert types[f"{prefix}.weight"].endswith("_SPQR")
        assert types[name] == types[f"{prefix}.outlier_value"] == "FLOAT"
        assert stored[f"{prefix}.outlier_value"].numel() == round(0.05 * stored[f"{prefix}.weight"].numel())
    assert not [str(check) for check in verify(out) if check.wrong]
    model = load(out, dtype=torch.float32)
    modules = [m for m in model.modules() if isinstance(m, IntegerLinear)]
    assert len(modules) == len(starts)
    assert all(isinstance(m.beside, OutlierWeights) for m in modules)


def test_the_plan_counts_what_is_stored() -> None:
    plain, sparser = (
        planned("llama-128", passes, scheme="w4a16-g32-asym", target="modelslim")
        for passes in ("gptq", "spqr{outliers=0.05}")
    )
    linears = [n for n in plain.final.graph.nodes if "scheme" in n.meta]
    sizes = [plain.final.leaf(n).parameters["weight"] for n in linears]  # type: ignore[union-attr]
    more = 8 * (sparser.layout.nbytes - plain.layout.nbytes) / sum(out * width for out, width in sizes)
    bits = [cost_of(one, peak=False).bits_per_weight for one in (plain, sparser)]
    assert bits[0] == pytest.approx(4 + 2 * 32 / 32)
    assert bits[1] - bits[0] == pytest.approx(more)
    assert more == pytest.approx(
        0.05 * 32 + 32 * sum(o + 1 for o, _ in sizes) / sum(o * i for o, i in sizes), 0.01
    )


@pytest.mark.parametrize(
    ("passes", "scheme", "target", "why"),
    [
        ("spqr", "w8a16", "vllm-ascend", "the server has no linear with outlier weights"),
        ("spqr", "w8a8", "modelslim", "beside float activations only"),
        ("spqr{outliers=0.00001}", "w4a16", "modelslim", "are none: take more"),
    ],
)
def test_where_they_cannot_stand_is_a_problem(passes: str, scheme: str, target: str, why: str) -> None:
    found = planned("llama-128", passes, scheme=scheme, target=target).problems
    assert any(why in problem for problem in found), found


@pytest.mark.parametrize("options", ["outliers=0", "outliers=0.5", "percdamp=0"])
def test_options_out_of_range_are_refused(options: str) -> None:
    with pytest.raises(Refused, match=options.partition("=")[0]):
        passes_of(f"spqr{{{options}}}")
