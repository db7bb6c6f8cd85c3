"""Smoothing across whatever lets a scale through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import qc
from qc.passes.sites import block_linears, width_in

from .across import across


@dataclass(frozen=True, kw_only=True)
class AcrossSmooth(qc.Pass):
    """Even the channels between two linears, across ops that let a scale through.

    **Why.** Few large channels between two linears make the grid of all channels coarse.

    **Before / after.** ``s = max|x|^strength``; the rows of the first are divided by s, the columns of the second
    multiplied.

    **Source.** SmoothQuant (arXiv 2211.10438).
    """

    name = "across_smooth"
    summary = "even the channels between two linears"
    patterns = (across,)
    requires = frozenset()
    provides = frozenset({qc.Fact.SMOOTHED})
    breaks = frozenset()
    before = {across: {"online_rotation": "the reader expects rotated channels by then"}}
    after = {}
    claim = qc.EXACT

    strength: float = 0.5
    """0 does nothing, 1 makes all channels equally large."""

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength}: it must be between 0 and 1")

    def rewrite(self, program: qc.Program, setting: qc.Setting) -> qc.Answer:
        rewrites = []
        inside = block_linears(program)
        for match in across.find(program):
            first, second = match.first, match.second
            if first.module not in inside or second.module not in inside:
                continue
            needs = (qc.Statistic("absmax", second.module),)
            width = len(second.channels or range(width_in(program, second.module)))
            slot = qc.Slot(f"{first.module}/{second.module}/scale", (width,), needs)
            edits = (
                qc.Edit(qc.Verb.SCALE_OUT, first, qc.Vector(slot, inverse=True)),
                qc.Edit(qc.Verb.SCALE_IN, second, qc.Vector(slot)),
            )
            rewrites.append(qc.Rewrite(self.name, "across", first.module, edits, qc.EXACT))
        return qc.Answer(tuple(rewrites))

    def solve(self, rewrite: qc.Rewrite, view: Any) -> Mapping[qc.Slot, torch.Tensor]:
        (slot,) = rewrite.slots
        largest = view.statistic(slot.needs[0])
        site = rewrite.edits[1].site
        if site.channels is not None:
            largest = largest[torch.tensor(site.channels)]
        return {slot: torch.where(largest > 0, largest.clamp(min=1e-5) ** self.strength, 1.0)}
