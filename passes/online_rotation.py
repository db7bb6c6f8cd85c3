"""Online rotation: a Kronecker-factored rotation before readers that no writer can absorb."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..compiler.contract import EXACT, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Kronecker
from ..compiler.pattern import Pattern, Site
from ..compiler.program import Program
from ..compiler.scheme import matches
from ..patterns.ov import ov
from ..patterns.up_down import up_down
from ..runtime.hadamard import has_hadamard
from ..runtime.kronecker import split
from .sites import block_linears, width_in


@dataclass(frozen=True, kw_only=True)
class OnlineRotation(Pass):
    """Rotate the input of o and down projections while the model runs.

    **Why.** Nothing that writes these inputs can absorb a rotation (attention keeps heads apart, a gated product
    is taken channel by channel), so it becomes an online op: ``x[a, b] -> Lᵀ x R`` with Hadamard factors.

    **Before / after.** ``W x`` becomes ``W' (L ⊗ R)ᵀ x`` with ``W' = L⁻¹ W R⁻ᵀ`` computed from the factors as
    they are stored. The split a·b is the server's own (``W4A4_FLATQUANT_DYNAMIC``).

    **Source.** QuaRot (arXiv 2404.00456) stages 1b and 1d; FlatQuant (arXiv 2410.09426) for the factored form.
    """

    name = "online_rotation"
    summary = "rotate the inputs of o and down projections at run time by Kronecker-factored Hadamards"
    patterns = (ov, up_down)
    requires = frozenset()
    provides = frozenset({Fact.ONLINE_ROTATED})
    breaks = frozenset()
    before = {}
    after = {}
    claim = EXACT

    enable_subgraph_type: tuple[str, ...] = ("ov", "up-down")
    """Which readers: the output projection of ``ov``, the down projection of ``up-down``."""
    include: tuple[str, ...] = ("*",)
    """Globs of reader names."""
    exclude: tuple[str, ...] = ()
    """Globs of reader names to leave alone."""
    factor: Literal["hadamard", "random"] = "hadamard"
    """``random`` takes random orthogonal factors, which exist for every width."""

    def __post_init__(self) -> None:
        unknown = set(self.enable_subgraph_type) - {"ov", "up-down"}
        if unknown:
            raise ValueError(f"enable_subgraph_type={'+'.join(sorted(unknown))}: types are ov and up-down")
        if self.factor not in ("hadamard", "random"):
            raise ValueError(f"factor={self.factor}: it is hadamard or random")

    def takes(self, setting: Setting) -> tuple[Pattern[object], ...]:
        """The enabled types."""
        return tuple(p for name, p in (("ov", ov), ("up-down", up_down)) if name in self.enable_subgraph_type)

    def readers(self, program: Program, setting: Setting) -> dict[str, str]:
        """The linears whose input may be rotated, and what finds them."""
        taken, readers = self.takes(setting), dict[str, str]()
        if ov in taken:
            readers |= {match.o.module: "ov" for match in ov.find(program)}
        if up_down in taken:
            readers |= {match.down.module: "up-down" for match in up_down.find(program)}
        return readers

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The readers."""
        return self.readers(program, setting)

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per reader."""
        readers, inside = self.readers(program, setting), block_linears(program)
        rewrites, problems = [], []
        for reader in sorted(readers, key=lambda name: list(inside).index(name) if name in inside else -1):
            if reader not in inside or not matches(reader, self.include) or matches(reader, self.exclude):
                continue
            rotation = self._rotation(program, reader, setting)
            if isinstance(rotation, str):
                problems.append(f"{reader}: {rotation}")
                continue
            edit = Edit(Verb.WRAP, Site(reader), rotation)
            rewrites.append(Rewrite(self.name, readers[reader], reader, (edit,), EXACT))
        return Answer(tuple(rewrites), (), tuple(problems))

    def _rotation(self, program: Program, reader: str, setting: Setting) -> Kronecker | str:
        width = width_in(program, reader)
        copies = setting.tp if reader in setting.row_parallel else 1
        if width % copies:
            return f"its width {width} can not be split over --tp {copies}"
        try:
            left, right = split(width // copies)
        except ValueError as error:
            return f"{error}: exclude it"
        lacking = [n for n in (left, right) if not has_hadamard(n)]
        if self.factor == "hadamard" and lacking:
            return (
                f"the server splits its width {width // copies} into {left} x {right}, and no Hadamard matrix of "
                f"order {lacking[0]} is known: take online_rotation{{factor=random}}, or exclude it"
            )
        return Kronecker(left, right, setting.seed, setting.dtype, copies, self.factor == "random")
