"""Outlier channels in float beside linears, so that the others have a finer scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.contract import EXACT, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Outliers, Slot, Statistic
from ..compiler.pattern import Site
from ..compiler.program import Program
from ..compiler.roles import read_together
from ..compiler.view import BlockView
from ..patterns.linear import linear
from .sites import block_linears, chosen, width_in
from .svd_res import AFTER


@dataclass(frozen=True, kw_only=True)
class OutlierChannels(Pass):
    """Take the input channels with outliers out of a linear and compute them in float.

    **Why.** A scale per token is that of its largest channel. Without the few channels that are huge, the others are
    rounded finely.

    **Before / after.** ``W x`` becomes ``W' x' + W[:, O] x[O]``: O are the channels that reach ``threshold`` anywhere
    in the calibration data, the largest first; x' and W' are zero there.

    **Source.** LLM.int8() (arXiv 2208.07339), section 3.2, which finds O anew in every call.
    """

    name = "outlier_channels"
    summary = "compute input channels with outliers in float, beside linears that are quantized"
    patterns = (linear,)
    requires = frozenset()
    provides = frozenset({Fact.BRANCHED})
    breaks = frozenset()
    before = {}
    after = {linear: AFTER}
    claim = EXACT

    threshold: float = 6.0
    """Magnitude that makes a channel an outlier."""
    share: float = 0.02
    """Places for outliers, as a share of the input channels of a linear."""
    include: tuple[str, ...] = ("*",)
    """Globs of linears."""
    exclude: tuple[str, ...] = ()
    """Globs of linears to leave alone."""

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold}: it must be above 0")
        if not 0 < self.share <= 0.5:
            raise ValueError(f"share={self.share}: it must be above 0 and at most 0.5")

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The linears of the blocks."""
        return block_linears(program)

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per linear; those that read one value take the same channels out of it."""
        together, rewrites = read_together(program), []
        for name in chosen(program, self.include, self.exclude):
            first, places = together[name][0], max(1, round(self.share * width_in(program, name)))
            slot = Slot(f"{first}/outliers", (places,), (Statistic("absmax", first),))
            edit = Edit(Verb.BRANCH, Site(name), Outliers(slot, setting.dtype))
            rewrites.append(Rewrite(self.name, "linear", name, (edit,), EXACT))
        return Answer(tuple(rewrites))

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Slot, Tensor]:
        """The channels that reach the threshold, in order, or the largest of them where places do not suffice."""
        (slot,) = rewrite.slots
        largest = view.statistic(slot.needs[0])
        found = int((largest >= self.threshold).sum())
        used = min(found, slot.shape[0])
        index = torch.full(slot.shape, -1, dtype=torch.int32)
        index[:used] = largest.topk(used).indices.sort().values.to(torch.int32)
        view.measures |= {"outlier channels": found, "in float": used}
        return {slot: index}
