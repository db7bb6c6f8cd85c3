"""Iterative smoothing: outliers move from activations into weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..compiler.contract import EXACT, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Slot, Statistic, Vector
from ..compiler.pattern import Pattern, Site
from ..compiler.program import Program
from ..compiler.scheme import matches
from ..compiler.view import BlockView
from ..patterns.linear_linear import linear_linear
from ..patterns.norm_linear import norm_linear
from ..patterns.ov import ov
from ..patterns.up_down import up_down
from .sites import block_linears, width_in

TYPES: Mapping[str, Pattern[Any]] = {
    "up-down": up_down,
    "ov": ov,
    "linear-linear": linear_linear,
    "norm-linear": norm_linear,
}
"""The recipe's names of subgraph types, in the order in which they are applied within a block."""

ONLINE = "the weights of the reader already expect the channels that the online rotation makes"


@dataclass(frozen=True, kw_only=True)
class IterSmooth(Pass):
    """Move activation outliers into weights, subgraph by subgraph.

    **Why.** A channel with large activations forces a coarse scale on all channels of its token; dividing it by
    s and multiplying the weights that read it by s keeps the function and evens the ranges.

    **Before / after.** ``s = clamp(max|x|^alpha / max|W|^(1 - alpha), scale_min)`` per channel; the writer's
    rows (or the norm's gain) are divided by s, the readers' columns multiplied. A channel that calibration
    never saw active is left as it is.

    **Source.** SmoothQuant (arXiv 2211.10438), eq. 4; the recipe's ``iter_smooth``.
    """

    name = "iter_smooth"
    summary = (
        "move activation outliers into weights through norm-linear, o-v, up-down and linear-linear sites"
    )
    patterns = (up_down, ov, linear_linear, norm_linear)
    requires = frozenset()
    provides = frozenset({Fact.SMOOTHED})
    breaks = frozenset({Fact.NORMS_FUSED})
    before = {ov: {"online_rotation": ONLINE}, up_down: {"online_rotation": ONLINE}}
    after = {norm_linear: {"fuse_norms": "its norm fusion takes the gain back into the weights"}}
    claim = EXACT

    alpha: float = 0.6
    """Migration strength, between 0 (weights decide) and 1 (activations decide).

    The recipe's 0.9 makes a few columns of the readers huge, and what an online rotation spreads over all
    channels is then amplified by them: all-W4A4 SmolLM2 goes from 2.0 to 3.7 times the float perplexity.
    """
    scale_min: float = 1e-5
    """Smallest scale."""
    symmetric: bool = True
    """False also subtracts the middle of each channel's range at norm-linear sites (the norm gets a bias)."""
    enable_subgraph_type: tuple[str, ...] | None = None
    """Subgraph types to smooth; None takes those that are meaningful where the pass stands."""
    include: tuple[str, ...] = ("*",)
    """Globs of writer names (norm, v, up, first linear)."""
    exclude: tuple[str, ...] = ()
    """Globs of writer names to leave alone."""
    group_method: Literal["max", "mean"] = "max"
    """How the query heads of a group are joined: statistics by max, or scales by mean."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: it must be between 0 and 1")
        if not 0 < self.scale_min < float("inf"):
            raise ValueError(f"scale_min={self.scale_min}: it must be positive")
        unknown = set(self.enable_subgraph_type or ()) - set(TYPES)
        if unknown:
            raise ValueError(
                f"enable_subgraph_type={'+'.join(sorted(unknown))}: types are {', '.join(TYPES)}"
            )
        if self.group_method not in ("max", "mean"):
            raise ValueError(f"group_method={self.group_method}: it is max or mean")

    def takes(self, setting: Setting) -> tuple[Pattern[Any], ...]:
        """The enabled types, or those that keep their effect at this place of the plan."""
        if self.enable_subgraph_type is not None:
            return tuple(TYPES[name] for name in TYPES if name in self.enable_subgraph_type)
        if "online_rotation" in setting.before:
            return (norm_linear,)
        if "fuse_norms" in setting.after:
            return (up_down, ov, linear_linear)
        return (up_down, ov, linear_linear, norm_linear)

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The writers: norms, v, up and first linears."""
        return dict.fromkeys(writer.module for writer, *_ in self.sites(program, self.takes(setting)))

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per match inside a block."""
        inside = block_linears(program)
        rewrites: list[Rewrite] = []
        taken = self.takes(setting)
        for found in self.sites(program, taken):
            writer, readers, heads, type_name = found
            if not all(reader.module in inside for reader in readers):
                continue  # the head keeps its norm: nothing there is quantized
            if matches(writer.module, self.include) and not matches(writer.module, self.exclude):
                rewrites.append(self._rewrite(program, writer, readers, heads, type_name))
        notes = [] if self.enable_subgraph_type is not None else [self._why(setting, taken)]
        rewrites.sort(key=lambda rewrite: inside[rewrite.edits[-1].site.module])
        return Answer(tuple(rewrites), tuple(notes))

    def sites(
        self, program: Program, taken: Iterable[Pattern[Any]]
    ) -> Iterable[tuple[Site, tuple[Site, ...], tuple[int, int, int] | None, str]]:
        """Writer, readers, (kv heads, head_dim, query heads per kv head) and type of every match."""
        if up_down in taken:
            for match in up_down.find(program):
                yield match.up, (match.down,), None, "up-down"
        if ov in taken:
            for match in ov.find(program):
                yield (
                    match.v,
                    (match.o,),
                    (match.kv_heads, match.head_dim, match.heads // match.kv_heads),
                    "ov",
                )
        if linear_linear in taken:
            for match in linear_linear.find(program):
                yield match.first, (match.second,), None, "linear-linear"
        if norm_linear in taken:
            for match in norm_linear.find(program):
                yield match.norm, match.readers, None, "norm-linear"

    def _why(self, setting: Setting, taken: tuple[Pattern[Any], ...]) -> str:
        names = ", ".join(name for name, pattern in TYPES.items() if pattern in taken)
        if "online_rotation" in setting.before:
            return f"{names}: after an online rotation only the norm's gain can still absorb a scale"
        if "fuse_norms" in setting.after:
            return f"{names}: norm-linear is left out, a later norm fusion would take the gain back"
        return f"{names}: no rotation stands in the way"

    def _rewrite(
        self, program: Program, writer: Site, readers: tuple[Site, ...],
        heads: tuple[int, int, int] | None, type_name: str,
    ) -> Rewrite:  # fmt: skip
        channels = (
            heads[0] * heads[1]
            if heads
            else len(readers[0].channels or range(width_in(program, readers[0].module)))
        )
        absmax = Statistic("range" if self._shifts(type_name) else "absmax", readers[0].module)
        slot = Slot(f"{writer.module}/{type_name}/scale", (channels,), (absmax,))
        spread = {"groups": heads[:2], "repeat": heads[2]} if heads else {}
        edits: list[Edit] = []
        if self._shifts(type_name):
            shift = Slot(f"{writer.module}/{type_name}/shift", (channels,), (absmax,))
            edits.append(Edit(Verb.SHIFT_OUT, writer, Vector(shift)))
            edits += [Edit(Verb.SHIFT_IN, reader, Vector(shift)) for reader in readers]
        edits.append(Edit(Verb.SCALE_OUT, writer, Vector(slot, inverse=True)))
        edits += [Edit(Verb.SCALE_IN, reader, Vector(slot, **spread)) for reader in readers]
        return Rewrite(self.name, type_name, writer.module, tuple(edits), EXACT)

    def _shifts(self, type_name: str) -> bool:
        return not self.symmetric and type_name == "norm-linear"

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Slot, Tensor]:
        """The scale (and shift) from the range of the first reader's input and the weights of all readers."""
        readers = [edit for edit in rewrite.edits if edit.verb is Verb.SCALE_IN]
        operand = readers[0].operand
        assert isinstance(operand, Vector)
        slots = {slot.name.rsplit("/", 1)[1]: slot for slot in rewrite.slots}
        values: dict[Slot, Tensor] = {}
        observed = view.statistic(operand.slot.needs[0])
        if "shift" in slots:
            shift = (observed[1] + observed[0]) / 2
            values[slots["shift"]] = shift
            observed = torch.maximum(observed[1] - shift, shift - observed[0])
        act = _ordered(observed, readers[0].site)
        weight = torch.stack(
            [_ordered(view.weight(e.site.module).abs().amax(0), e.site) for e in readers]
        ).amax(0)
        if operand.groups is not None and self.group_method == "max":
            act, weight = _joined(act, operand, torch.amax), _joined(weight, operand, torch.amax)
        scale = act**self.alpha / weight.clamp(min=1e-5) ** (1 - self.alpha)
        scale = torch.where(act > 0, scale.clamp(min=self.scale_min), 1.0)
        if operand.groups is not None and self.group_method == "mean":
            scale = _joined(scale, operand, torch.mean)
        values[slots["scale"]] = scale
        return values


def _ordered(per_channel: Tensor, site: Site) -> Tensor:
    """A vector per input channel of a module, in the order of the match's channels."""
    return per_channel if site.channels is None else per_channel[torch.tensor(site.channels)]


def _joined(per_query: Tensor, operand: Vector, how: Any) -> Tensor:
    """[query heads · head_dim] joined over the query heads of each kv head: [kv heads · head_dim]."""
    assert operand.groups is not None
    kv_heads, head_dim = operand.groups
    return how(per_query.view(kv_heads, operand.repeat, head_dim), dim=1).flatten()
