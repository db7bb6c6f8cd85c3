"""Sparse float weights: entries that matter least become zero, the others make up for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..compiler.contract import LOSSY, Answer, BlockSize, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Slot, Statistic, Weight
from ..compiler.pattern import Site
from ..compiler.program import Program
from ..compiler.scheme import matches
from ..compiler.view import BlockView
from ..patterns.linear import linear
from .admm import admm_prune, largest_by_effect, short_mantissa
from .sites import block_linears, width_in, width_out


@dataclass(frozen=True, kw_only=True)
class FloatSparse(Pass):
    """Prune weights that stay float, and shorten the mantissas of those that are left.

    **Why.** Zeros and short numbers compress well, for devices that unpack weights as they read them.

    **Before / after.** W becomes the sparse W' of least error on the calibration inputs (ADMM); entries that are kept
    have two bits behind the leading one, but for the 2 % of each row that matter most.

    **Source.** The recipe's ``float_sparse`` (``spec/modelslim.md`` 2.14); arXiv 2401.02938.
    """

    name = "float_sparse"
    summary = "prune float weights on calibration data, and shorten what is left of them"
    patterns = (linear,)
    requires = frozenset()
    provides = frozenset({Fact.PRUNED})
    breaks = frozenset()
    before = {}
    after = {}
    claim = LOSSY

    sparse_ratio: float = 0.3
    """Share of the weights of each row that become zero, 0 to 1."""
    include: tuple[str, ...] = ("*",)
    """Globs of linears."""
    exclude: tuple[str, ...] = ()
    """Globs of linears to leave alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparse_ratio < 1:
            raise ValueError(f"sparse_ratio={self.sparse_ratio}: it must be 0 or more and below 1")

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The linears of the blocks."""
        return block_linears(program)

    def working_bytes(self, block: BlockSize) -> int:
        """Hessians of all linears, and of the largest its inverse in float64 and four copies of the weight."""
        if not block.linears:
            return 0
        widest = max(block.linears, key=lambda one: one.width)
        largest = max(one.out * one.width for one in block.linears)
        return 4 * sum(one.width**2 for one in block.linears) + 24 * widest.width**2 + 24 * largest

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per linear."""
        taken = {str(node.target) for node in program.graph.nodes if "scheme" in node.meta}
        rewrites = []
        for name in block_linears(program):
            if name in taken or not matches(name, self.include) or matches(name, self.exclude):
                continue
            shape = (width_out(program, name), width_in(program, name))
            slot = Slot(f"{name}/sparse", shape, (Statistic("hessian", name),))
            edit = Edit(Verb.SET_WEIGHT, Site(name), Weight(slot, "W16A16S"))
            rewrites.append(Rewrite(self.name, "linear", name, (edit,), LOSSY))
        return Answer(tuple(rewrites))

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Slot, Tensor]:
        """Prune, then shorten."""
        (edit,) = rewrite.edits
        assert isinstance(edit.operand, Weight)
        slot, weight = edit.operand.slot, view.weight(edit.site.module)
        hessian = view.statistic(slot.needs[0])
        sparse = admm_prune(weight, hessian, self.sparse_ratio)
        changed = sparse - weight
        noise, signal = ((one @ hessian * one).sum() for one in (changed, weight))
        view.measures |= {"relative error": float(noise.clamp(min=0) / signal.clamp(min=1e-30)) ** 0.5}
        return {slot: short_mantissa(sparse, largest_by_effect(sparse, hessian))}
