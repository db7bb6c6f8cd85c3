"""Weights that are edited in pieces: the same numbers, and less memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qc.compiler import pieces
from qc.compiler.certificate import Cast
from qc.compiler.memory import edit_bytes
from qc.compiler.pieces import PIECE, on_pieces, rounded, runs
from tests.homes import Home, compiled, tensors_of


@pytest.mark.broad
@pytest.mark.parametrize(
    ("family", "passes", "scheme"),
    [
        ("llama-128", "iter_smooth,quarot{online=true},linear_quant", "w4a4"),
        ("llama-128", "iter_smooth{symmetric=false},linear_quant", "w4a16-g64"),
        ("llama-128", "flatquant{iters=1},linear_quant", "w4a4"),
        ("gpt2", "iter_smooth{enable_subgraph_type=norm-linear+non-fusion},linear_quant", "w8a8"),
    ],
)
def test_a_compile_in_pieces_writes_the_same(
    home: Callable[[str], Home],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    passes: str,
    scheme: str,
) -> None:
    """Biases, rows and columns, linears that are stored the other way around: pieces of a few rows each."""
    place, given = home(family), {"scheme": scheme, "target": "modelslim", "dtype": "float32"}
    whole = compiled(place, tmp_path / "whole", passes, **given)
    monkeypatch.setattr(pieces, "PIECE", 500)
    cut = compiled(place, tmp_path / "cut", passes, **given)
    ours, theirs = tensors_of(whole.path), tensors_of(cut.path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert whole.journal.proofs == cut.journal.proofs


def test_pieces_are_rows_or_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 8)
    seen: list[tuple[tuple[int, ...], int]] = []

    def change(tensors: dict[str, torch.Tensor]) -> None:
        seen.append((tuple(tensors["weight"].shape), len(tensors.get("bias", ()))))
        tensors["weight"] = tensors["weight"] * 2
        tensors["left"] = torch.ones(1)
        if "bias" in tensors:
            tensors["bias"] = tensors["bias"] + 1

    for axis, shapes in ((0, [(2, 4)] * 3), (1, [(6, 1)] * 4), (None, [(6, 4)])):
        seen.clear()
        weight = torch.arange(24.0).view(6, 4)
        tensors = {"weight": weight.clone(), "bias": torch.zeros(6)}
        on_pieces(tensors, axis, change)
        assert [shape for shape, _ in seen] == shapes
        assert sum(length for _, length in seen) == 6, "the bias is changed once"
        assert torch.equal(tensors["weight"], 2 * weight)
        assert torch.equal(tensors["bias"], torch.ones(6))
        assert "left" in tensors
    assert list(runs("aabbb", {"a": 0, "b": 1}.get)) == [(0, ["a", "a"]), (1, ["b", "b", "b"])]


def test_rounding_in_pieces_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(0, 1, 30, dtype=torch.float64).view(5, 6)
    want = x.to(torch.bfloat16).double()
    monkeypatch.setattr(pieces, "PIECE", 7)
    assert torch.equal(rounded(x.clone(), torch.bfloat16), want)
    cast = Cast({"x": x, "index": torch.arange(3)}, torch.bfloat16)
    assert torch.equal(cast["x"], want)
    assert cast["index"].dtype == torch.int64
    assert set(cast) == {"x", "index"}


def test_a_large_linear_takes_less_per_weight() -> None:
    assert edit_bytes(PIECE) == 32 * PIECE
    assert edit_bytes(10 * PIECE) < 15 * 10 * PIECE
