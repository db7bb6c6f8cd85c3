"""AutoRound: rounding learned block by block, from a closed-form start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..compiler.contract import LOSSY, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Quantize
from ..compiler.pattern import Site
from ..compiler.plan import unused_rules
from ..compiler.program import Program
from ..compiler.scheme import Rule
from ..compiler.view import BlockView
from ..patterns.linear import linear
from ..runtime.quantized import QuantizedLinear
from .block_rounding import BlockRounding, Training
from .linear_quant import swaps
from .sites import block_linears
from .strategies import own_scheme


@dataclass(frozen=True, kw_only=True)
class AutoRound(Pass):
    """Learn the rounding of all linears of a block together.

    **Why.** At 4 bits the nearest integer is not the best one: what matters is what the block computes.

    **Before / after.** As ``linear_quant``, with other integers. Scales come from a clip search weighted by the
    inputs, integers from GPTQ on the quantized inputs in the order of the dataflow, then SignSGD moves offsets
    and scales towards the float block's output. The best state on held-out calibration data is kept, the
    untrained one included. Linears of 8 bits are rounded to nearest and take part as they are.

    **Source.** AutoRound (arXiv 2309.05516), GPTQ (arXiv 2210.17323).
    """

    name = "autoround"
    summary = "replace linears by integer ones, with rounding learned block by block"
    patterns = (linear,)
    requires = frozenset()
    provides = frozenset({Fact.QUANTIZED})
    breaks = frozenset()
    before = {}
    after = {}
    claim = LOSSY

    iters: int = 50
    """Steps of SignSGD per block, one microbatch each."""
    enable_round_tuning: bool = True
    """Train rounding offsets."""
    enable_minmax_tuning: bool = True
    """Train scales."""
    quantized_input: bool = True
    """Train on what the quantized blocks before hand on; false is the reference tool's float chain."""
    strategies: tuple[str | Rule, ...] = ()
    """Formats of its own instead of the plan's scheme: ``SCHEME:GLOB|GLOB``, the first that matches a linear wins."""
    include: tuple[str, ...] = ("*",)
    """Globs of linears."""
    exclude: tuple[str, ...] = ()
    """Globs of linears that stay as they are."""

    def __post_init__(self) -> None:
        if self.iters < 0:
            raise ValueError(f"iters={self.iters}: it must not be negative")
        own_scheme(self.strategies)

    @property
    def needs_training(self) -> bool:
        """It runs the block with gradients."""
        return True

    @property
    def propagates_quantized(self) -> bool:
        """Whether blocks see quantized inputs."""
        return self.quantized_input

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per block, over all its linears that are to be quantized."""
        problems: tuple[str, ...] = ()
        if self.strategies:
            setting = replace(setting, scheme=own_scheme(self.strategies))
            problems = tuple(unused_rules(setting.scheme, program))
        chosen, more = swaps(program, setting, self.include, self.exclude)
        parts = block_linears(program)
        by_block: dict[int, list[Edit]] = {}
        for name, operand in chosen.items():
            by_block.setdefault(parts[name], []).append(Edit(Verb.SWAP, Site(name), operand))
        names = {part.index: part.name for part in program.parts}
        rewrites = tuple(
            Rewrite(self.name, "linear", names[index], tuple(edits), LOSSY)
            for index, edits in by_block.items()
        )
        return Answer(rewrites, (), (*problems, *more))

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Any, QuantizedLinear]:
        """The start for every linear in the order of the dataflow, then training of all of them."""
        swaps = {
            edit.site.module: edit.operand for edit in rewrite.edits if isinstance(edit.operand, Quantize)
        }
        training = Training(self.iters, self.enable_round_tuning, self.enable_minmax_tuning)
        solved = BlockRounding(swaps, view, rewrite.where).solve(training)
        return {swaps[name].slot: q for name, q in solved.items()}
