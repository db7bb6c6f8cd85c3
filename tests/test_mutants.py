"""The checker is checked: what is done wrong on purpose is caught, what is done right is let through."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import mutant_captures, mutant_rewrites
from benchmarks.mutant_rewrites import LAYER_NORM, RIGHT, RMS, ScaleKeys
from benchmarks.mutants import Kill, mutants

pytestmark = pytest.mark.broad

CASES = {f"{name} in {family}": kill for name, family, kill in mutants()}
FEW = ("llama", "qwen2", "gemma2", "gpt_oss", "granite")
"""Families on which spoiled captures are tried in the fast tests; the others are slow."""
CAPTURES = {f"{m.name} in {f}" for m in mutant_captures.MUTANTS for f in m.families if f not in FEW}
ENDS = {"wrong side", "missed reader", "transposed", "inverse for inverse transpose", "forgotten bias",
        "wrong grouping", "rope pairs", "eps of the norms lost", "eps of the norms changed", "all-ones", "tie not cut",
        "soft cap", "window", "sinks", "attention scale", "shift not compensated"}  # fmt: skip
"""What has to be tried."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in CAPTURES else ()) for case in CASES]
)
def test_a_mutant_is_caught(case: str) -> None:
    kill: Kill = CASES[case]
    assert kill()


@pytest.mark.parametrize("family", [*RMS, *LAYER_NORM, "qwen2", "phi3"])
def test_what_is_done_right_is_let_through(family: str) -> None:
    for passes in RIGHT:
        assert not mutant_rewrites.killed_by(None, family, passes), passes


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_scales_of_whole_rope_pairs_are_let_through(family: str) -> None:
    passes: list[Any] = [ScaleKeys(pairs=True)]
    assert not mutant_rewrites.killed_by(None, family, passes)


def test_every_way_is_tried_on_three_families() -> None:
    tried = {m.name: set(m.families) for m in (*mutant_rewrites.MUTANTS, *mutant_captures.MUTANTS)}
    for words in ENDS:
        families = set[str]().union(*(own for name, own in tried.items() if words in name))
        assert len(families) >= 3 or words == "soft cap", words


def test_a_mutant_that_changes_nothing_is_an_error() -> None:
    idle = mutant_rewrites.Mutant("idle", ("llama",), "fuse_norms", {})
    with pytest.raises(ValueError, match="nothing to do wrong"):
        mutant_rewrites.killed_by(idle, "llama")
