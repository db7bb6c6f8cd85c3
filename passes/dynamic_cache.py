"""Int8 caches of keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.attention_sites import AttentionSite, attention_sites, grid_sites
from ..compiler.contract import LOSSY, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Slot, Statistic, Stub
from ..compiler.pattern import Site
from ..compiler.program import Program
from ..compiler.scheme import Int
from ..compiler.view import BlockView
from .act_range import act_scale

NAMES = {1: "k_proj", 2: "v_proj"}
"""Operand to the name below the attention under which the layout looks for its grid, whatever the model's own names."""


@dataclass(frozen=True, kw_only=True)
class DynamicCache(Pass):
    """Keep keys and values in int8, one scale per channel.

    **Why.** With long contexts the cache is what fills the device. Halving it doubles the batch.

    **Before / after.** Keys (after rope) and values are cached as ``round(x / s + z)`` with a scale per key head and
    channel, from the range of all calibration tokens. Stubs before the attention show where.

    **Source.** The recipe's ``dynamic_cache``, whose observer keeps the last batch alone: here it is all of them.
    KVQuant (arXiv 2401.18079) on why keys are quantized per channel.
    """

    name = "dynamic_cache"
    summary = "keep keys and values in int8, one scale per channel"
    patterns = ()
    requires = frozenset()
    provides = frozenset({Fact.QUANTIZED})
    breaks = frozenset()
    before = {}
    after = {}
    claim = LOSSY

    symmetric: bool = True
    """False gives every channel an offset, which no server of today reads back rightly."""
    include: tuple[str, ...] = ("*",)
    """Globs of attention modules."""
    exclude: tuple[str, ...] = ()
    """Globs of attention modules to leave alone."""

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The attentions."""
        return [site.module for site in attention_sites(program)]

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per attention."""
        sites, problems = grid_sites(program, self.name, self.include, self.exclude, NAMES.values())
        return Answer(tuple(self._rewrite(site) for site in sites), problems=problems)

    def _rewrite(self, site: AttentionSite) -> Rewrite:
        edits = []
        for operand, name in NAMES.items():
            heads, width = site.sizes(operand)
            needs = (Statistic("range", f"{site.node}:{operand}"),)
            slot = Slot(f"{site.module}.{name}/cache", (2, heads * width), needs)
            stub = Stub(site.node, operand, "cache", "channel", slot, self.symmetric)
            edits.append(Edit(Verb.STUB, Site(f"{site.module}.{name}"), stub))
        return Rewrite(self.name, "attention", site.module, tuple(edits), LOSSY)

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Slot, Tensor]:
        """Scale and offset of every channel from its range."""
        act = Int(8, "channel", symmetric=self.symmetric)
        values: dict[Slot, Tensor] = {}
        for slot in rewrite.slots:
            low, high = view.statistic(slot.needs[0])
            values[slot] = torch.stack(act_scale(low, high, act, view.export_dtype))
        return values
