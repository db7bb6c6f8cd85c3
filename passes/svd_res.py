"""A low-rank branch in float beside linears, so that only the residual is quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.contract import EXACT, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import LowRank, Slot
from ..compiler.pattern import Site
from ..compiler.program import Program
from ..compiler.view import BlockView
from ..patterns.linear import linear
from .flatquant import LATE
from .sites import block_linears, chosen, width_in, width_out

ONE = "a linear has one branch"
AFTER = {**LATE, "svd_res": ONE, "outlier_channels": ONE, "flatquant": LATE["awq"]}
"""What may not follow a pass that puts a float part beside linears, and why."""


@dataclass(frozen=True, kw_only=True)
class SvdRes(Pass):
    """Split a weight into its largest singular directions, kept in float, and a residual that is quantized.

    **Why.** What makes a weight hard to round often lies in few directions. Without them its range is smaller.

    **Before / after.** ``W x`` becomes ``(W - L2 L1) x + L2 (L1 x)`` with ``L1 = Vᵀ`` [rank, in] and ``L2 = U S``
    [out, rank], rounded to the dtype of export before they are taken off.

    **Source.** SVDQuant (arXiv 2411.05007), section 4; the recipe's ``svd_res`` (``spec/modelslim.md`` 2.14).
    """

    name = "svd_res"
    summary = "keep the largest singular directions of weights in float, beside linears that are quantized"
    patterns = (linear,)
    requires = frozenset()
    provides = frozenset({Fact.BRANCHED})
    breaks = frozenset()
    before = {}
    after = {linear: AFTER}
    claim = EXACT

    rank: int = 32
    """Directions that are kept."""
    include: tuple[str, ...] = ("*",)
    """Globs of linears."""
    exclude: tuple[str, ...] = ()
    """Globs of linears to leave alone."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: it must be at least 1")

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The linears of the blocks."""
        return block_linears(program)

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per linear."""
        rewrites, problems = [], []
        for name in chosen(program, self.include, self.exclude):
            out, width = width_out(program, name), width_in(program, name)
            if self.rank > min(out, width):
                problems.append(f"{name}: rank={self.rank} is more than its {out} x {width} weight has")
                continue
            slots = Slot(f"{name}/l1", (self.rank, width)), Slot(f"{name}/l2", (out, self.rank))
            edit = Edit(Verb.BRANCH, Site(name), LowRank(*slots, setting.dtype))
            rewrites.append(Rewrite(self.name, "linear", name, (edit,), EXACT))
        return Answer(tuple(rewrites), problems=tuple(problems))

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Slot, Tensor]:
        """The largest singular values and directions."""
        (edit,) = rewrite.edits
        assert isinstance(edit.operand, LowRank)
        left, values, right = torch.linalg.svd(view.weight(edit.site.module), full_matrices=False)
        kept = slice(self.rank)
        return {
            edit.operand.first: right[kept].contiguous(),
            edit.operand.second: left[:, kept] * values[kept],
        }
