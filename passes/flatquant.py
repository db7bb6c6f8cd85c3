"""FlatQuant: learned transforms before linears of four-bit activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiler.contract import EXACT, Answer, BlockSize, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.errors import Failed
from ..compiler.operand import Kronecker, Slot, Vector, stored_factors
from ..compiler.pattern import Site
from ..compiler.plan import OF_THE_PASSES
from ..compiler.program import Program
from ..compiler.roles import read_together
from ..compiler.scheme import W4A4, LinearScheme, matches
from ..compiler.view import BlockView
from ..patterns.linear import linear
from ..runtime.hadamard import has_hadamard
from ..runtime.kronecker import split
from .affine import Affine, grouped, train
from .block_rounding import HELD_OUT, NOT_FINITE
from .importance import relative_error
from .sites import block_linears, width_in
from .smoothing import TYPES, Place, places

WIDEST = 4
"""Bits of an activation before which a transform pays, and before which servers have one."""
LATE = dict.fromkeys(
    ("smooth_quant", "iter_smooth", "flex_smooth_quant", "flex_awq_ssz", "awq", "fuse_norms", "rotate_residual",
     "rotate_heads", "adapt_rotation", "online_rotation", "quarot_online"),
    "the weights that it would change expect what the learned transforms make of their inputs",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FlatQuant(Pass):
    """Learn an invertible transform before every linear of four-bit activations.

    **Why.** A fixed rotation spreads outliers; a learned transform makes activation and weight flat together, for
    the error that the block makes of them.

    **Before / after.** ``W x`` becomes ``W' (L ⊗ R)ᵀ x / d`` with ``W' = L⁻¹ (W diag(d)) R⁻ᵀ``. The division by d goes
    to the norm, v or up that writes x. Linears that read one value share L, R, d and a clip ratio, as servers need.

    **Source.** FlatQuant (arXiv 2410.09426), section 3; ``spec/modelslim.md`` 2.14.
    """

    name = "flatquant"
    summary = "learn a Kronecker transform, a diagonal and clip ratios before linears of four-bit activations"
    patterns = (linear,)
    requires = frozenset()
    provides = frozenset({Fact.ONLINE_ROTATED})
    breaks = frozenset({Fact.NORMS_FUSED})
    before = {}
    after = {linear: LATE}
    claim = EXACT

    iters: int = 60
    """Steps of AdamW per block, one microbatch each."""
    lr: float = 0.01
    """Rate of factors and diagonals; clip ratios move ten times as fast."""
    factors: Literal["invertible", "orthogonal"] = "invertible"
    """``orthogonal`` learns rotations (a Cayley parametrisation): fewer degrees of freedom, no weight grows."""
    diagonal: bool = True
    """Learn a scale per channel too, where something that writes the value can take it in."""
    include: tuple[str, ...] = ("*",)
    """Globs of linears; of those that read one value all or none are taken."""
    exclude: tuple[str, ...] = ()
    """Globs of linears to leave alone."""

    def __post_init__(self) -> None:
        if self.iters < 0:
            raise ValueError(f"iters={self.iters}: it must not be negative")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr={self.lr}: it must be above 0 and below 1")
        if self.factors not in ("invertible", "orthogonal"):
            raise ValueError(f"factors={self.factors}: they are invertible or orthogonal")

    @property
    def needs_training(self) -> bool:
        """It runs the block with gradients."""
        return True

    def working_bytes(self, block: BlockSize) -> int:
        """A step holds each weight folded, divided, rounded, cut and its gradients, and what a backward pass reads."""
        mine = [one for one in block.linears if one.scheme is not None and _flat(one.scheme)]
        if not mine:
            return 0
        channels = sum(3 * one.width + one.out for one in mine) + block.activations
        return 32 * sum(one.out * one.width for one in mine) + 2 * block.tokens * block.itemsize * channels

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The linears of the blocks."""
        return block_linears(program)

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per block, over all groups of linears that read one value."""
        inside, together = block_linears(program), read_together(program)
        rotated = {str(node.target) for node in program.graph.nodes if "rotated" in node.meta}
        by_block: dict[int, list[Edit]] = {}
        problems: list[str] = []
        absorbers = absorbers_of(program) if self.diagonal else {}
        for group in dict.fromkeys(together[name] for name in inside):
            wanted = [name for name in group if self._wants(name, setting)]
            if not wanted or rotated & set(group):
                continue
            if len(wanted) < len(group):
                left = next(name for name in group if name not in wanted)
                problems.append(
                    f"{wanted[0]}: {left} reads the same value and is left out: a server runs them as one, so take"
                    " all of them or none"
                )
                continue
            rotation = self._transform(program, group, setting)
            if isinstance(rotation, str):
                problems.append(f"{group[0]}: {rotation}")
                continue
            edits = by_block.setdefault(inside[group[0]], [])
            if (place := absorbers.get(group)) is not None:
                edits += diagonal_edits(program, place)
            edits += [Edit(Verb.WRAP, Site(name), rotation) for name in group]
        names = {part.index: part.name for part in program.parts}
        rewrites = (Rewrite(self.name, "linear", names[i], tuple(e), EXACT) for i, e in by_block.items())
        notes = () if by_block or problems else ("no site: no linear of the blocks has four-bit activations",)
        return Answer(tuple(rewrites), notes, tuple(problems))

    def _wants(self, name: str, setting: Setting) -> bool:
        chosen = matches(name, self.include) and not matches(name, self.exclude)
        return chosen and (setting.scheme == OF_THE_PASSES or _flat(setting.scheme.of(name, setting.roles)))

    def _transform(self, program: Program, group: tuple[str, ...], setting: Setting) -> Kronecker | str:
        width = width_in(program, group[0])
        copies = setting.tp if group[0] in setting.row_parallel else 1
        if width % copies:
            return f"its width {width} can not be split over --tp {copies}"
        try:
            left, right = split(width // copies)
        except ValueError as error:
            return f"{error}: exclude it"
        slots = (
            Slot(f"{group[0]}/left", (left, left)),
            Slot(f"{group[0]}/right", (right, right)),
            Slot(f"{group[0]}/clip", (1,)),
        )
        return Kronecker(left, right, setting.seed, setting.dtype, copies, slots=slots)

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Slot, Any]:
        """Train all transforms of a block together, from random Hadamard factors."""
        found = self._start(rewrite, view)
        of = {name: one for one in found.values() for name in one.readers}
        assert view.forward is not None
        assert view.target is not None
        forward, target = view.forward, view.target

        def hook(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if name in of:
                one, scheme = of[name], of[name].readers[name]
                x, weight = one.act(x, scheme), one.weight(name, view.weight(name), scheme)
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

        indices = list(range(view.batches))
        held = indices[HELD_OUT - 1 :: HELD_OUT] or indices[-1:]
        losses = train(
            list(found.values()), lambda index: relative_error(forward(hook, index), target(index)),
            [i for i in indices if i not in held] or indices, held, iters=self.iters, rate=self.lr,
            generator=view.generator(rewrite.where), report=view.report,
        )  # fmt: skip
        if not isfinite(losses.start):
            raise Failed(f"{rewrite.where}: {NOT_FINITE}")
        losses.tell(view)
        values: dict[Slot, Any] = {}
        for operand, one in found.items():
            values |= zip(operand.slots, (*one.factors(), torch.sigmoid(one.clip)), strict=True)
        scales = {slot for slot in rewrite.slots if slot.name.endswith("/diagonal")}
        for edit in rewrite.edits:
            if isinstance(edit.operand, Vector) and edit.operand.slot in scales and not edit.operand.inverse:
                diagonal = of[edit.site.module].diagonal()
                assert diagonal is not None
                values[edit.operand.slot] = diagonal
        return values

    def _start(self, rewrite: Rewrite, view: BlockView) -> dict[Kronecker, Affine]:
        scaled = {
            edit.site.module: edit.operand
            for edit in rewrite.edits
            if edit.verb is Verb.SCALE_IN and isinstance(edit.operand, Vector)
        }
        readers: dict[Kronecker, dict[str, LinearScheme]] = {}
        for edit in rewrite.edits:
            if isinstance(edit.operand, Kronecker):
                name = edit.site.module
                planned = view.planned.get(name)
                readers.setdefault(edit.operand, {})[name] = W4A4 if planned is None else planned.scheme
        found: dict[Kronecker, Affine] = {}
        for operand, schemes in readers.items():
            first = next(iter(schemes))
            described = Kronecker(
                operand.left, operand.right, operand.seed, operand.dtype, operand.copies,
                random=not (has_hadamard(operand.left) and has_hadamard(operand.right)),
            )  # fmt: skip
            left, right = (factor.float().clone() for factor in stored_factors(described))
            one = found[operand] = Affine(left, right, operand.dtype, schemes)
            if self.factors == "orthogonal":
                one.skew = (torch.zeros_like(left), torch.zeros_like(right))
            vector = scaled.get(first)
            if vector is not None:
                one.log_diagonal = torch.zeros(vector.slot.shape)
                one.spread = _spread(vector)
            for name, scheme in schemes.items():
                assert scheme.weight is not None
                rows, groups, _ = grouped(view.weight(name), scheme.weight).shape
                one.weight_clip[name] = one.clip.repeat(rows, groups, 1)
        return found


def _spread(vector: Vector) -> Any:
    return lambda diagonal: vector.value({vector.slot: diagonal}, diagonal.dtype)


def _flat(scheme: LinearScheme) -> bool:
    return scheme.act is not None and scheme.act.bits <= WIDEST and scheme.weight is not None


def absorbers_of(program: Program) -> dict[tuple[str, ...], Place]:
    """For groups of linears that read one value whole, the match whose writer can take a scale per channel in."""
    found: dict[tuple[str, ...], Place] = {}
    together = read_together(program)
    types = [TYPES[name] for name in ("up-down", "ov", "norm-linear")]
    for place in places(program, types):
        names = tuple(reader.module for reader in place.readers)
        whole = all(reader.channels is None for reader in place.readers)
        if whole and place.degree == 1 and together.get(names[0]) == names:
            found.setdefault(names, place)
    return found


def diagonal_edits(program: Program, place: Place) -> Iterable[Edit]:
    """The writer divided by a scale per channel, the readers multiplied by it."""
    first = place.readers[0].module
    channels = place.groups[0] * place.groups[1] if place.groups else width_in(program, first)
    slot = Slot(f"{first}/diagonal", (channels,))
    yield Edit(Verb.SCALE_OUT, place.writer, Vector(slot, inverse=True))
    for reader in place.readers:
        yield Edit(Verb.SCALE_IN, reader, Vector(slot, groups=place.groups, repeat=place.repeat))
