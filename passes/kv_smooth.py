"""Smoothing of keys: outlier channels of the key cache move into the queries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.attention_sites import AttentionSite, attention_sites
from ..compiler.contract import EXACT, Answer, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Slot, Statistic, Vector
from ..compiler.program import Program
from ..compiler.rope_pairs import Carrier, carrier
from ..compiler.scheme import matches
from ..compiler.view import BlockView

AFTER = ("dynamic_cache", "fa3_quant")


@dataclass(frozen=True, kw_only=True)
class KvSmooth(Pass):
    """Divide channels of the keys by a scale and multiply those of the queries.

    **Why.** A few channels of the keys are far larger than the rest, on all tokens. Whoever quantizes a cache per token
    or per head loses the small ones.

    **Before / after.** ``s = max|k|^smooth_factor`` per key head and channel, one scale for all channels that rope
    turns into each other. It is taken out of the rows of k, or of the gain of the norm behind it, and put into those
    of q: the scores stay what they were.

    **Source.** The recipe's ``kv_smooth``; SmoothQuant (arXiv 2211.10438) for the idea of moving a scale.
    """

    name = "kv_smooth"
    summary = "move outlier channels of the keys into the queries, through rope"
    patterns = ()
    requires = frozenset()
    provides = frozenset()
    breaks = frozenset()
    before = {}
    after = {}
    claim = EXACT

    smooth_factor: float = 1.0
    """Power of the largest key, above 0: 1 makes all channels alike."""
    include: tuple[str, ...] = ("*",)
    """Globs of attention modules."""
    exclude: tuple[str, ...] = ()
    """Globs of attention modules to leave alone."""

    def __post_init__(self) -> None:
        if not 0 < self.smooth_factor < float("inf"):
            raise ValueError(f"smooth_factor={self.smooth_factor}: it must be positive")

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The attentions."""
        return [site.module for site in attention_sites(program)]

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per attention through which a scale passes."""
        late = [name for name in AFTER if name in setting.before]
        if late:
            return Answer((), problems=(f"it stands after {late[0]}, whose grids are made for the keys before it:"
                                        f" put it before {late[0]}",))  # fmt: skip
        nodes = {node.name: node for node in program.graph.nodes}
        rewrites: list[Rewrite] = []
        left: list[str] = []
        for site in attention_sites(program):
            if not matches(site.module, self.include) or matches(site.module, self.exclude):
                continue
            found = [carrier(program, nodes[site.node], operand) for operand in (0, 1)]
            reasons = [
                f"{name}: {one}"
                for name, one in zip(("queries", "keys"), found, strict=True)
                if isinstance(one, str)
            ]
            if reasons:
                left.append(f"{site.module}: {reasons[0]}")
                continue
            queries, keys = (one for one in found if isinstance(one, Carrier))
            rewrites.append(self._rewrite(site, queries, keys))
        notes = (f"{len(left)} attentions are left alone, {left[0]}",) if left else ()
        return Answer(tuple(rewrites), notes)

    def _rewrite(self, site: AttentionSite, queries: Carrier, keys: Carrier) -> Rewrite:
        """Where a norm holds the channels of all heads at once, all heads share their scales."""
        heads = 1 if queries.shared or keys.shared else site.kv_heads
        mixed = joined(site.head_dim, (*queries.mixed, *keys.mixed))
        index = tuple(next(i for i, group in enumerate(mixed) if c in group) for c in range(site.head_dim))
        slot = Slot(f"{site.module}/keys", (heads * len(mixed),), (Statistic("absmax", f"{site.node}:1"),))

        def vector(one: Carrier, count: int, inverse: bool) -> Vector:
            repeat = 1 if one.shared else count // heads
            return Vector(slot, inverse, (heads, len(mixed)), repeat, index)

        edits = (
            Edit(Verb.SCALE_OUT, keys.site, vector(keys, site.kv_heads, True)),
            Edit(Verb.SCALE_OUT, queries.site, vector(queries, site.heads, False)),
        )
        return Rewrite(self.name, "attention", site.module, edits, EXACT)

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Slot, Tensor]:
        """Scales from the largest keys; channels that rope mixes, and heads that share a norm, have one."""
        (slot,) = rewrite.slots
        vector = rewrite.edits[0].operand
        assert isinstance(vector, Vector)
        assert vector.groups is not None
        assert vector.index is not None
        heads, entries = vector.groups
        largest = view.statistic(slot.needs[0]).view(-1, len(vector.index))
        if len(largest) != heads:
            largest = largest.amax(0, keepdim=True)
        index = torch.tensor(vector.index).to(view.device).expand(heads, -1)
        found = largest.new_zeros(heads, entries).scatter_reduce(1, index, largest, "amax")
        return {slot: torch.where(found > 0, found**self.smooth_factor, 1.0).flatten()}


def joined(width: int, groups: Iterable[tuple[int, ...]]) -> list[set[int]]:
    """The finest partition of 0..width-1 in which every group lies in one set, in order of first channels."""
    sets = [{c} for c in range(width)]
    for group in groups:
        touched = [one for one in sets if one & set(group)]
        sets = [one for one in sets if not one & set(group)] + [set().union(*touched)]
    return sorted(sets, key=min)
