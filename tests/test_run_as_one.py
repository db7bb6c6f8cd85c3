"""Linears that a server runs as one: what it keeps once for all of them is the same in the files of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qc.compiler.contract import Rewrite
from qc.compiler.errors import Failed
from qc.compiler.export import RunAsOne
from qc.compiler.view import BlockView
from qc.passes.linear_quant import LinearQuant
from tests.homes import Home, compiled, tensors_of

GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("llama-128", "iter_smooth,linear_quant"),
        ("llama-128", "linear_quant{include=*.q_proj+*.up_proj},autoround{iters=1}"),
        ("qwen2", "iter_smooth{symmetric=false},linear_quant"),
    ],
)
def test_static_ranges_are_those_of_the_value_that_is_read(
    family: str, passes: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    compiled(home(family), tmp_path / "out", passes, scheme="w8a8-static")
    tensors = tensors_of(tmp_path / "out")
    for leaf in ("input_scale", "input_offset"):
        found = [
            [float(tensors[f"model.layers.{layer}.{name}.{leaf}"]) for name in group]
            for layer in range(3)
            for group in GROUPS
        ]
        assert all(len(set(shards)) == 1 for shards in found)
        assert len({shards[0] for shards in found}) > 1, "every value has one range: nothing was measured"


def wide_key(self: LinearQuant, rewrite: Rewrite, view: BlockView) -> Mapping[Any, Any]:
    (made,) = solve(self, rewrite, view).items()
    slot, q = made
    assert q.input_scale is not None
    return {slot: replace(q, input_scale=2 * q.input_scale) if "1.self_attn.k_proj" in rewrite.where else q}


solve = LinearQuant.solve


def test_shards_that_differ_stop_the_export(
    home: Callable[[str], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinearQuant, "solve", wide_key)
    place = home("llama-128")
    with pytest.raises(Failed, match=r"input_scale of (.*\.)q_proj and of \1k_proj differ"):
        compiled(place, tmp_path / "out", "linear_quant", scheme="w8a8-static")
    assert list(tmp_path.iterdir()) == []
    compiled(place, tmp_path / "out", "linear_quant", scheme="w8a8-static", target="modelslim")


def test_only_what_has_no_axis_of_outputs_is_compared() -> None:
    watch = RunAsOne({"q": "q", "k": "q"})
    one, two = torch.ones(4, 4), torch.zeros(4, 4)
    for module, tensor in (("q", one), ("k", two), ("o", one), ("v", two)):
        watch.check(module, "weight_scale", tensor)
    watch.check("o", "left_trans", two)
    watch.check("q", "left_trans", one)
    watch.check("k", "left_trans", one.clone())
    watch.check("q", "right_trans", one)
    with pytest.raises(Failed, match="right_trans of q and of k differ"):
        watch.check("k", "right_trans", two)
