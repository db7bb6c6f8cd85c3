"""Online rotations as the reference tool stores them: over heads before o, a Kronecker pair before down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..compiler.contract import EXACT, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Kronecker
from ..compiler.pattern import Site
from ..compiler.program import Program
from ..patterns.ov import ov
from ..patterns.up_down import up_down
from ..runtime.hadamard import has_hadamard
from ..runtime.kronecker import laos_split
from .sites import block_linears, width_in


@dataclass(frozen=True, kw_only=True)
class QuarotOnline(Pass):
    """Rotate the inputs of o and of chosen down projections while the model runs, in tensors of their own.

    **Why.** For readers of the reference tool's W4A4 checkpoints. vllm-ascend does not load them: what it serves is
    ``online_rotation``.

    **Before / after.** ``o``: x[heads, d] becomes ``Rᵀ x``, R block-diagonal of Hadamard matrices of order
    ``max_tp_size``. ``down``: x[m, k] becomes ``R1ᵀ x R2``, R1 block-diagonal likewise, R2 a Hadamard matrix. The
    weights take the inverses of the factors as they are stored.

    **Source.** The recipe's ``quarot`` with ``online: true`` (LAOS); QuaRot (arXiv 2404.00456), stages 1b and 1d.
    """

    name = "quarot_online"
    summary = "rotate inputs of o and down at run time, stored as the reference tool does"
    patterns = (ov, up_down)
    requires = frozenset()
    provides = frozenset({Fact.ONLINE_ROTATED})
    breaks = frozenset()
    before = {}
    after = {}
    claim = EXACT

    max_tp_size: int = 4
    """Most tensor-parallel ranks, a power of 2: rotations stay within blocks of so many heads or rows."""
    down_proj_online_layers: tuple[int, ...] = ()
    """Layers, counted from 0, whose down projection is rotated."""

    def __post_init__(self) -> None:
        size = self.max_tp_size
        if size < 1 or size & (size - 1):
            raise ValueError(f"max_tp_size={size}: it must be a power of 2")
        if any(layer < 0 for layer in self.down_proj_online_layers):
            raise ValueError(
                f"down_proj_online_layers={min(self.down_proj_online_layers)}: layers are counted from 0"
            )

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The readers."""
        return [match.o.module for match in ov.find(program)]

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per reader."""
        inside = block_linears(program)
        layer = {part.index: number for number, part in enumerate(program.blocks)}
        rewrites, problems = [], []
        for match in ov.find(program):
            if match.o.module not in inside:
                continue
            if match.heads % self.max_tp_size:
                problems.append(
                    f"{match.o.module}: max_tp_size={self.max_tp_size} does not divide its {match.heads} heads"
                )
                continue
            width = width_in(program, match.o.module) // match.heads
            rewrites.append(self._turned(match.o.module, "ov", "heads", match.heads, width, setting))
        for match in up_down.find(program):
            reader = match.down.module
            if reader not in inside or layer[inside[reader]] not in self.down_proj_online_layers:
                continue
            sizes = self._sizes(width_in(program, reader))
            if isinstance(sizes, str):
                problems.append(f"{reader}: {sizes}")
                continue
            rewrites.append(self._turned(reader, "up-down", "kronecker", *sizes, setting))
        rewrites.sort(key=lambda rewrite: list(inside).index(rewrite.where))
        beyond = [number for number in self.down_proj_online_layers if number >= len(layer)]
        notes = (
            f"down_proj_online_layers names {len(beyond)} layers that the model does not have: {beyond[0]} is the"
            f" first, and it has {len(layer)}",
        ) if beyond else ()  # fmt: skip
        return Answer(tuple(rewrites), notes, tuple(problems))

    def _turned(
        self, reader: str, type_name: str, layout: str, left: int, right: int, setting: Setting
    ) -> Rewrite:
        rotation = Kronecker(
            left, right, setting.seed, setting.dtype, layout=layout, block=self.max_tp_size,  # type: ignore[arg-type]
        )  # fmt: skip
        return Rewrite(self.name, type_name, reader, (Edit(Verb.WRAP, Site(reader), rotation),), EXACT)

    def _sizes(self, width: int) -> tuple[int, int] | str:
        try:
            left, right = laos_split(width)
        except ValueError as error:
            return f"{error}: leave its layer out of down_proj_online_layers"
        if left % self.max_tp_size:
            return f"its width splits into {left} x {right}, and max_tp_size={self.max_tp_size} does not divide {left}"
        if not has_hadamard(right):
            return f"its width splits into {left} x {right}, and no Hadamard matrix of order {right} is known"
        return left, right
