"""What smoothing passes share: the sites where a scale can move from activations into weights, and their edits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..compiler.contract import EXACT, Answer, BlockSize, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Divisor, Quantize, Slot, Statistic, Vector
from ..compiler.pattern import Pattern, Site
from ..compiler.program import Program
from ..compiler.roles import read_together
from ..compiler.scheme import matches
from ..compiler.statistics import ROWS
from ..compiler.view import BlockView
from ..patterns.linear import linear
from ..patterns.linear_linear import linear_linear
from ..patterns.norm_linear import norm_linear
from ..patterns.ov import ov
from ..patterns.relu_linear import relu_linear
from ..patterns.up_down import up_down
from .sites import block_linears, width_in

TYPES: Mapping[str, Pattern[Any]] = {
    "up-down": up_down,
    "ov": ov,
    "linear-linear": linear_linear,
    "relu-linear": relu_linear,
    "norm-linear": norm_linear,
    "non-fusion": linear,
}
"""The recipe's names of subgraph types, in the order in which they are applied within a block."""

ONLINE_PASSES = ("online_rotation", "quarot_online")
ONLINE = "the weights of the reader already expect the channels that the online rotation makes"
GRID = "its int8 grid stands between v and the attention, and is made for the values before it"
GROUP_METHODS = ("max", "mean")


@dataclass(frozen=True)
class Place:
    """A match of any of the types: one writer, the linears that read it, and how heads share its channels."""

    writer: Site
    readers: tuple[Site, ...]
    type_name: str
    groups: tuple[int, int] | None = None
    """Key heads and channels per head, where each channel of the writer is read by several query heads."""
    repeat: int = 1
    """Query heads per key head."""
    degree: int = 1
    """The power to which a scale of the writer arrives at the readers."""


@dataclass(frozen=True)
class Subgraph:
    """One place while its scale is found: what its readers read and their weights, in the match's order of channels."""

    view: BlockView
    readers: tuple[Edit, ...]
    observed: Mapping[str, Tensor]
    """Statistics of what the readers read by kind, channels last."""

    @property
    def spread(self) -> Vector:
        """How the writer's channels lie in those of the readers."""
        operand = self.readers[0].operand
        if isinstance(operand, Divisor):
            return Vector(operand.slot)
        assert isinstance(operand, Vector)
        return operand

    @cached_property
    def weights(self) -> tuple[Tensor, ...]:
        """[out, channels] of every reader."""
        return tuple(ordered(self.view.weight(e.site.module), e.site) for e in self.readers)

    @property
    def planned(self) -> Quantize | None:
        """What the plan is going to make of the first reader."""
        return self.view.planned.get(self.readers[0].site.module)

    def joined(self, per_query: Tensor, how: Callable[..., Tensor]) -> Tensor:
        """[channels of the readers] joined over the query heads that share a key head: [channels of the writer]."""
        if self.spread.groups is None:
            return per_query
        kv_heads, head_dim = self.spread.groups
        return how(per_query.view(kv_heads, self.spread.repeat, head_dim), dim=1).flatten()

    def in_readers(self, scale: Tensor) -> Tensor:
        """[channels of the writer] as [channels of the readers]."""
        return self.spread.value({self.spread.slot: scale}, scale.dtype)


class Smoothing(Pass, ABC):
    """A pass that divides the channels of a writer by a scale and multiplies the columns of its readers by it."""

    patterns = (up_down, ov, linear_linear, relu_linear, norm_linear, linear)
    requires = frozenset()
    provides = frozenset({Fact.SMOOTHED})
    breaks = frozenset({Fact.NORMS_FUSED})
    before = {
        ov: {**dict.fromkeys(ONLINE_PASSES, ONLINE), "dynamic_cache": GRID, "fa3_quant": GRID},
        up_down: dict.fromkeys(ONLINE_PASSES, ONLINE),
    }
    after = {norm_linear: {"fuse_norms": "its norm fusion takes the gain back into the weights"}}
    claim = EXACT
    needs: ClassVar[tuple[str, ...]] = ("absmax",)
    """Kinds of statistics of what the readers read."""
    subtypes: ClassVar[tuple[str, ...]] = tuple(TYPES)
    """Subgraph types that it knows."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    @property
    def enabled(self) -> tuple[str, ...] | None:
        """The types that were asked for; None for those that are meaningful where the pass stands."""
        return getattr(self, "enable_subgraph_type", self.subtypes)

    @abstractmethod
    def scale(self, found: Subgraph) -> Tensor:
        """The scale of each channel of the writer, float32, above zero."""

    def shifts(self, type_name: str) -> bool:
        """Whether the middle of each channel's range is subtracted too; ``range`` is then observed."""
        return False

    def __post_init__(self) -> None:
        unknown = set(self.enabled or ()) - set(self.subtypes)
        if unknown:
            raise ValueError(
                f"enable_subgraph_type={'+'.join(sorted(unknown))}: types are {', '.join(self.subtypes)}"
            )
        if getattr(self, "group_method", "max") not in GROUP_METHODS:
            raise ValueError(f"group_method={self.group_method}: it is max or mean")  # type: ignore[attr-defined]

    def working_bytes(self, block: BlockSize) -> int:
        """For a search: sampled rows of every reader, and of the widest place (two linears) what a trial makes of it.

        A trial holds the weight, scaled, over its scale, as integers and on its grid, and two outputs of the rows.
        """
        if "rows" not in self.needs or not block.linears:
            return 0
        rows = 4 * ROWS * sum(one.width for one in block.linears)
        widest = max(block.linears, key=lambda one: one.out * one.width)
        return rows + 2 * (20 * widest.out * widest.width + 12 * ROWS * (widest.out + widest.width))

    def takes(self, setting: Setting) -> tuple[Pattern[Any], ...]:
        """The enabled types, or those that keep their effect at this place of the plan."""
        if self.enabled is not None:
            return tuple(TYPES[name] for name in TYPES if name in self.enabled)
        if set(ONLINE_PASSES) & set(setting.before):
            return (norm_linear,)
        if "fuse_norms" in setting.after:
            return (up_down, ov, linear_linear, relu_linear)
        return (up_down, ov, linear_linear, relu_linear, norm_linear)

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The writers: norms, v, up and first linears."""
        return dict.fromkeys(place.writer.module for place in places(program, self.takes(setting)))

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per match inside a block."""
        inside = block_linears(program)
        rewrites: list[Rewrite] = []
        taken = self.takes(setting)
        for place in places(program, taken):
            if not all(reader.module in inside for reader in place.readers):
                continue  # the head keeps its norm: nothing there is quantized
            writer = place.writer.module
            if matches(writer, self.include) and not matches(writer, self.exclude):
                rewrites.append(self._rewrite(program, place, setting))
        notes = [] if self.enabled is not None else [_why(setting, taken, rewrites)]
        rewrites.sort(key=lambda rewrite: inside[rewrite.edits[-1].site.module])
        return Answer(tuple(rewrites), tuple(notes))

    def _rewrite(self, program: Program, place: Place, setting: Setting) -> Rewrite:
        writer, readers, type_name = place.writer, place.readers, place.type_name
        width = len(readers[0].channels or range(width_in(program, readers[0].module)))
        channels = place.groups[0] * place.groups[1] if place.groups else width
        kinds = [kind for kind in self.needs if not (kind == "absmax" and self.shifts(type_name))]
        kinds += ["range"] if self.shifts(type_name) else []
        needs = tuple(Statistic(kind, readers[0].module) for kind in kinds)
        slot = Slot(f"{writer.module}/{type_name}/scale", (channels,), needs)
        edits: list[Edit] = []
        if self.shifts(type_name):
            shift = Slot(f"{writer.module}/{type_name}/shift", (channels,), needs)
            edits.append(Edit(Verb.SHIFT_OUT, writer, Vector(shift)))
            edits += [Edit(Verb.SHIFT_IN, reader, Vector(shift)) for reader in readers]
        if type_name == "non-fusion":
            edits += [Edit(Verb.DIVIDE, reader, Divisor(slot, setting.dtype)) for reader in readers]
            return Rewrite(self.name, type_name, writer.module, tuple(edits), EXACT)
        edits.append(Edit(Verb.SCALE_OUT, writer, Vector(slot, inverse=True, power=1 / place.degree)))
        spread = Vector(slot, groups=place.groups, repeat=place.repeat)
        edits += [Edit(Verb.SCALE_IN, reader, spread) for reader in readers]
        return Rewrite(self.name, type_name, writer.module, tuple(edits), EXACT)

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Slot, Tensor]:
        """The scale (and shift) from what was observed at the first reader and from the weights of all readers."""
        readers = tuple(edit for edit in rewrite.edits if edit.verb in (Verb.SCALE_IN, Verb.DIVIDE))
        slots = {slot.name.rsplit("/", 1)[1]: slot for slot in rewrite.slots}
        needs = slots["scale"].needs
        observed = {need.kind: ordered(view.statistic(need), readers[0].site) for need in needs}
        values: dict[Slot, Tensor] = {}
        if "shift" in slots:
            low, high = observed["range"]
            shift = values[slots["shift"]] = (high + low) / 2
            observed["absmax"] = torch.maximum(high - shift, shift - low)
        values[slots["scale"]] = self.scale(Subgraph(view, readers, observed))
        return values


def places(program: Program, taken: Iterable[Pattern[Any]]) -> Iterable[Place]:
    """Every match of some types."""
    taken = tuple(taken)
    if up_down in taken:
        for match in up_down.find(program):
            yield Place(match.up, (match.down,), "up-down")
    if ov in taken:
        for match in ov.find(program):
            groups, repeat = (match.kv_heads, match.head_dim), match.heads // match.kv_heads
            yield Place(match.v, (match.o,), "ov", groups, repeat)
    if linear_linear in taken:
        for match in linear_linear.find(program):
            yield Place(match.first, (match.second,), "linear-linear")
    if relu_linear in taken:
        for match in relu_linear.find(program):
            yield Place(match.first, (match.second,), "relu-linear", degree=match.degree)
    if norm_linear in taken:
        for match in norm_linear.find(program):
            yield Place(match.norm, match.readers, "norm-linear")
    if linear in taken:
        yield from unabsorbed(program)


def unabsorbed(program: Program) -> Iterable[Place]:
    """Linears of blocks whose input nothing can scale but an op of its own; its first reader stands for the writer."""
    fusing = tuple(pattern for name, pattern in TYPES.items() if name != "non-fusion")
    absorbed = {reader.module for place in places(program, fusing) for reader in place.readers}
    changed = {
        str(node.target)
        for node in program.graph.nodes
        if node.meta.keys() & {"rotated", "divided", "branch"}
    }
    inside = block_linears(program)
    for group in dict.fromkeys(read_together(program)[name] for name in inside):
        sites = tuple(Site(name) for name in group)
        if not (absorbed | changed) & set(group) and all(name in inside for name in group):
            yield Place(sites[0], sites, "non-fusion")


def ordered(channels_last: Tensor, site: Site) -> Tensor:
    """Something per input channel of a module, channels last, in the order of the match's channels."""
    if site.channels is None:
        return channels_last
    return channels_last[..., torch.tensor(site.channels).to(channels_last.device)]


def _why(setting: Setting, taken: tuple[Pattern[Any], ...], rewrites: Iterable[Rewrite]) -> str:
    """Which types are taken here, and why; ReLU is named where the model has it."""
    there = {"up-down", "ov", "linear-linear", "norm-linear"} | {rewrite.pattern for rewrite in rewrites}
    names = ", ".join(name for name, pattern in TYPES.items() if pattern in taken and name in there)
    if set(ONLINE_PASSES) & set(setting.before):
        return f"{names}: after an online rotation only the norm's gain can still absorb a scale"
    if "fuse_norms" in setting.after:
        return f"{names}: norm-linear is left out, a later norm fusion would take the gain back"
    return f"{names}: no rotation stands in the way"
