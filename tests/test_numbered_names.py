"""Names folded over their numbers come back, all of them and no other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qc.compiler.numbered_names import folded, unfolded

NUMBERS = st.sampled_from(["0", "1", "2", "3", "4", "5", "10", "11", "007", "x", "q_proj"])
NAMES = st.lists(st.lists(NUMBERS, min_size=1, max_size=4).map(".".join), unique=True, max_size=40)


@given(NAMES)
def test_folding_is_undone(names: list[str]) -> None:
    back = [name for pattern in folded(names) for name in unfolded(pattern)]
    assert sorted(back) == sorted(names)


def test_what_it_looks_like() -> None:
    layers = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(30) if i != 7 for e in range(64)]
    assert folded(layers) == ["model.layers.{{0..6},{8..29}}.mlp.experts.{0..63}.up_proj"]
    assert folded(["h.0.a", "h.1.a", "lm_head"]) == ["h.{0,1}.a", "lm_head"]
    assert folded([]) == []
