"""Int8 queries, keys and values for a quantized attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..compiler.attention_sites import AttentionSite, attention_sites, grid_sites
from ..compiler.contract import LOSSY, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Slot, Statistic, Stub
from ..compiler.pattern import Site
from ..compiler.program import Program
from ..compiler.view import BlockView
from ..runtime.quantize import round_scale, scale_for

SCOPES = ("per_head", "per_token", "float")
NAMES = ("fa_q", "fa_k", "fa_v")


@dataclass(frozen=True, kw_only=True)
class Fa3Quant(Pass):
    """Put q, k and v on int8 grids before the attention reads them.

    **Why.** An attention kernel in int8 is faster than one in bfloat16 where sequences are long.

    **Before / after.** Stubs stand behind rope and before the attention, on any architecture: ``per_head`` has one
    fixed scale per head from the shortest window that holds a share of all values seen (the recall window),
    ``per_token`` finds one per head and token while the model runs.

    **Source.** The recipe's ``fa3_quant``; FlashAttention-3 (arXiv 2407.08608), section 3.3, on block scales.
    """

    name = "fa3_quant"
    summary = "put q, k and v on int8 grids before the attention reads them"
    patterns = ()
    requires = frozenset()
    provides = frozenset({Fact.QUANTIZED})
    breaks = frozenset()
    before = {}
    after = {}
    claim = LOSSY

    fa_q: Literal["per_head", "per_token", "float"] = "per_head"
    """What shares a scale of the queries; ``float`` leaves them alone."""
    fa_k: Literal["per_head", "per_token", "float"] = "per_head"
    """What shares a scale of the keys."""
    fa_v: Literal["per_head", "per_token", "float"] = "per_head"
    """What shares a scale of the values."""
    recall_qk: float = 0.9999
    """Share of the values of a head of q or k that its window holds; what lies outside is cut."""
    recall_v: float = 1.0
    """That of v; 1 takes the whole range."""
    fa_amp: int = 0
    """How many attentions stay float: those whose outputs the grids change most, found on the calibration text."""
    include: tuple[str, ...] = ("*",)
    """Globs of attention modules."""
    exclude: tuple[str, ...] = ()
    """Globs of attention modules to leave alone."""

    def __post_init__(self) -> None:
        for option in NAMES:
            if getattr(self, option) not in SCOPES:
                raise ValueError(f"{option}={getattr(self, option)}: it is one of {', '.join(SCOPES)}")
        for option in ("recall_qk", "recall_v"):
            if not 0 < getattr(self, option) <= 1:
                raise ValueError(f"{option}={getattr(self, option)}: it must be above 0 and at most 1")
        if self.fa_amp < 0:
            raise ValueError(f"fa_amp={self.fa_amp}: it must not be negative")
        if all(getattr(self, option) == "float" for option in NAMES):
            raise ValueError("fa_q=float: with fa_k and fa_v float too there is nothing to quantize")

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The attentions."""
        return [site.module for site in attention_sites(program)]

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per attention."""
        sites, problems = grid_sites(program, self.name, self.include, self.exclude, NAMES)
        if self.fa_amp and self.fa_amp >= len(sites):
            problems = (
                *problems,
                f"fa_amp={self.fa_amp} leaves none of the {len(sites)} attentions quantized",
            )
        notes = (
            (f"the {self.fa_amp} worst of them stay float, found when it is compiled",) if self.fa_amp else ()
        )
        return Answer(tuple(self._rewrite(site) for site in sites), notes, problems)

    def _rewrite(self, site: AttentionSite) -> Rewrite:
        edits = []
        for operand, name in enumerate(NAMES):
            scope = getattr(self, name)
            if scope == "float":
                continue
            watched = f"{site.node}:{operand}"
            needs = () if scope == "per_token" else (Statistic("range", watched), Statistic("rows", watched))
            heads, _ = site.sizes(operand)
            slot = Slot(f"{site.module}/{name}", (2, 1 if scope == "per_token" else heads), needs)
            stub = Stub(site.node, operand, "fa", "token" if scope == "per_token" else "head", slot)
            edits.append(Edit(Verb.STUB, Site(f"{site.module}.{name}"), stub))
        return Rewrite(self.name, "attention", site.module, tuple(edits), LOSSY)

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Slot, Tensor]:
        """Scales of every head from its window; a scale that is found at run time is 1 here."""
        values: dict[Slot, Tensor] = {}
        for edit in rewrite.edits:
            stub = edit.operand
            assert isinstance(stub, Stub)
            if stub.scope == "token":
                values[stub.slot] = torch.tensor([[1.0], [0.0]])
                continue
            found = {need.kind: view.statistic(need) for need in stub.slot.needs}
            heads = stub.slot.shape[1]
            share = self.recall_v if stub.operand == 2 else self.recall_qk
            top = found["range"].abs().amax(0).view(heads, -1).amax(1)
            if share < 1:
                rows = found["rows"].view(len(found["rows"]), heads, -1).transpose(0, 1).flatten(1)
                top = torch.minimum(top, recall_window(rows, share))
            scale = round_scale(scale_for(top, 8), view.export_dtype)
            values[stub.slot] = torch.stack([scale, torch.zeros_like(scale)])
        return values


def recall_window(values: Tensor, share: float) -> Tensor:
    """The larger end, in magnitude, of the shortest window that holds a share of the values [heads, n]; [heads]."""
    ordered = values.sort(dim=1).values
    inside = max(1, round(share * ordered.shape[1]))
    lengths = ordered[:, inside - 1 :] - ordered[:, : ordered.shape[1] - inside + 1]
    start = lengths.argmin(1)
    low = ordered.gather(1, start[:, None])
    high = ordered.gather(1, start[:, None] + inside - 1)
    return torch.maximum(low.abs(), high.abs()).squeeze(1)
