"""Order the channels between up and down by size, so that groups of one scale hold channels of one size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import qc
from qc.passes.sites import block_linears, width_in
from qc.patterns.up_down import up_down


@dataclass(frozen=True, kw_only=True)
class OutlierOrder(qc.Pass):
    """Sort the channels that a gated product hands to its reader by the largest weight that reads them.

    **Why.** Where some channels share a scale, one outlier makes the grid of its whole group coarse. Sorted, outliers
    share a group with outliers.

    **Before / after.** The rows of gate and up and the columns of down, all in one new order.

    **Source.** Channel reordering as in RPTQ (arXiv 2304.01089) and Atom (arXiv 2310.19102).
    """

    name = "outlier_order"
    summary = "order the channels between up and down by size, so that outliers share groups"
    patterns = (up_down,)
    requires = frozenset()
    provides = frozenset()
    breaks = frozenset()
    before = {up_down: {"online_rotation": "it expects the channels in their order"}}
    after = {}
    claim = qc.EXACT

    def rewrite(self, program: qc.Program, setting: qc.Setting) -> qc.Answer:
        """One rewrite per product of two linears that have all their channels in order."""
        inside, rewrites = block_linears(program), []
        for match in up_down.find(program):
            sites = (match.up, *match.gate_writers, match.down)
            whole = all(one.channels is None and one.module in inside for one in sites)
            if not whole or len({one.module for one in sites}) != 3:  # a packed gate_up is one module
                continue
            order = qc.Permutation(
                qc.Slot(f"{match.down.module}/order", (width_in(program, match.down.module),))
            )
            edits = [qc.Edit(qc.Verb.ROTATE_OUT, one, order) for one in sites[:2]]
            edits.append(qc.Edit(qc.Verb.ROTATE_IN, match.down, order))
            rewrites.append(qc.Rewrite(self.name, "up_down", match.down.module, tuple(edits), qc.EXACT))
        return qc.Answer(tuple(rewrites))

    def solve(self, rewrite: qc.Rewrite, view: Any) -> Mapping[qc.Slot, torch.Tensor]:
        """Channels of down, those with the largest weights first."""
        (slot,) = rewrite.slots
        return {slot: view.weight(rewrite.where).abs().amax(0).argsort(descending=True, stable=True)}
