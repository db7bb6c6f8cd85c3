"""A low-rank branch that corrects the error of rounding a weight, instead of holding its largest directions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import qc
from qc.compiler.view import BlockView
from qc.passes.scale_trial import fake_weight
from qc.passes.svd_res import SvdRes


@dataclass(frozen=True, kw_only=True)
class ErrorCorrection(SvdRes):
    """Split a weight into a branch L and a rest, such that what rounding does to the rest is least.

    **Why.** The error of rounding has directions too; those that calibration data excites most are given back in float.

    **Before / after.** ``W x`` becomes ``(W - L) x + L x``, where L is the part of rank ``rank`` of ``W - Q(W - L)``
    that is largest on the calibration data, found by alternating the two.

    **Source.** LQER (arXiv 2402.02446) for the error and its weights, LoftQ (arXiv 2310.08659) for the alternation.
    """

    name = "error_correction"
    summary = "correct the rounding of weights by a low-rank branch in float"

    rounds: int = 5
    """Alternations of rounding and decomposing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: it must be at least 1")

    def rewrite(self, program: qc.Program, setting: qc.Setting) -> qc.Answer:
        """The branches of ``svd_res``, which now want to know how large each input channel is."""
        answer = super().rewrite(program, setting)
        rewrites = []
        for one in answer.rewrites:
            (edit,) = one.edits
            assert isinstance(edit.operand, qc.LowRank)
            first = replace(edit.operand.first, needs=(qc.Statistic("meansquare", one.where),))
            rewrites.append(replace(one, edits=(replace(edit, operand=replace(edit.operand, first=first)),)))
        return replace(answer, rewrites=tuple(rewrites))

    def solve(self, rewrite: qc.Rewrite, view: BlockView) -> Mapping[qc.Slot, Tensor]:
        """Alternate: round what the branch leaves, give the branch the largest directions of the error."""
        first, second = rewrite.slots
        weight, planned = view.weight(rewrite.where), view.planned.get(rewrite.where)
        size = view.statistic(first.needs[0]).sqrt().clamp(min=1e-6)
        l1, l2 = torch.zeros(first.shape), torch.zeros(second.shape)
        for _ in range(self.rounds if planned else 0):
            error = weight - fake_weight(weight - l2 @ l1, planned.scheme, planned.weight_method)  # type: ignore[union-attr]
            left, values, right = torch.linalg.svd(error * size, full_matrices=False)
            l1, l2 = right[: self.rank] / size, left[:, : self.rank] * values[: self.rank]
        return {first: l1.contiguous(), second: l2.contiguous()}
