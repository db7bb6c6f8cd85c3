"""GPTQ: integers of linears column by column, on the inputs that the quantized model sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..compiler.contract import LOSSY, Answer, BlockSize, Fact, Pass, Rewrite, Setting
from ..compiler.operand import Quantize
from ..compiler.program import Program
from ..compiler.scheme import Rule
from ..compiler.view import BlockView
from ..patterns.linear import linear
from ..runtime.quantized import QuantizedLinear
from .block_rounding import BlockRounding, Start
from .linear_quant import block_swaps, swapped, swaps
from .sites import block_linears
from .strategies import check_methods, setting_of

WIDEST = 8
"""Integers of any width are searched."""


@dataclass(frozen=True, kw_only=True)
class Gptq(Pass):
    """Round the columns of a weight one after another, each error carried into those to come.

    **Why.** What rounding one column gets wrong, the columns that are still open can make good, as far as inputs are
    correlated.

    **Before / after.** As ``linear_quant``, with other integers. Scales come from a clip search weighted by the inputs.
    Linears are taken in the order of the dataflow, with everything before them quantized. Behind an online rotation a
    clip ratio for the activation is searched as well.

    **Source.** GPTQ (arXiv 2210.17323); the weights of tokens as in GuidedQuant (arXiv 2505.07004).
    """

    name = "gptq"
    summary = "replace linears by integer ones, each rounding error carried into the columns to come"
    patterns = (linear,)
    requires = frozenset()
    provides = frozenset({Fact.QUANTIZED})
    breaks = frozenset()
    before = {}
    after = {}
    claim = LOSSY
    weight_methods = ("gptq",)
    act_methods = ("minmax", "histogram")

    percdamp: float = 0.01
    """What is added to the diagonal of the Hessian, as a share of its mean."""
    act_order: bool = True
    """Take columns in the order of falling activation; false takes them as they stand."""
    weighted: bool = True
    """Weigh tokens by how much an error there moves the output of the block; false weighs all alike."""
    quantized_input: bool = True
    """Read what the quantized blocks before hand on; false is the float chain."""
    strategies: tuple[str | Rule, ...] = ()
    """Formats of its own instead of the plan's scheme: ``SCHEME:GLOB|!GLOB``, the first that matches a linear wins."""
    include: tuple[str, ...] = ("*",)
    """Globs of linears."""
    exclude: tuple[str, ...] = ()
    """Globs of linears that stay as they are."""

    def __post_init__(self) -> None:
        if not 0 < self.percdamp <= 1:
            raise ValueError(f"percdamp={self.percdamp}: it must be above 0 and at most 1")
        check_methods(self.strategies, self)

    @property
    def needs_training(self) -> bool:
        """It runs the block as a function of its linears."""
        return True

    @property
    def needs_target(self) -> bool:
        """It looks at the inputs of linears alone."""
        return False

    @property
    def propagates_quantized(self) -> bool:
        """Whether blocks see quantized inputs."""
        return self.quantized_input

    def working_bytes(self, block: BlockSize) -> int:
        """Dense and integer weights; then the larger of a backward pass for the weights of tokens and one search.

        Per entry of a Hessian 24 bytes: itself, in its order, and two of its factors and its inverse in float64.
        """
        mine = [one for one in block.linears if one.scheme is not None and one.scheme.weight is not None]
        if not mine:
            return 0
        channels = sum(one.width + one.out for one in block.linears) + block.activations
        backward = block.tokens * block.itemsize * channels if self.weighted else 0
        search = 24 * max(one.width**2 for one in mine) + 24 * max(one.out * one.width for one in mine)
        return 5 * sum(one.out * one.width for one in mine) + max(backward, search + block.walked)

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The linears of the blocks."""
        return block_linears(program)

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per block, over all its linears that are to be quantized."""
        chosen, problems = self.chosen(program, setting)
        return Answer(block_swaps(self.name, program, chosen), (), problems)

    def chosen(self, program: Program, setting: Setting) -> tuple[dict[str, Quantize], tuple[str, ...]]:
        """The linears that are to be quantized, and the problems."""
        setting, problems = setting_of(self.strategies, program, setting)
        chosen, more = swaps(program, setting, self.include, self.exclude, self.weight_methods[0])
        return chosen, (*problems, *more)

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Any, QuantizedLinear]:
        """Every linear in the order of the dataflow."""
        chosen = swapped(rewrite)
        begin = Start(WIDEST, self.percdamp, self.act_order, self.weighted)
        solved = BlockRounding(chosen, view, rewrite.where, begin).solve()
        return {chosen[name].slot: q for name, q in solved.items()}
