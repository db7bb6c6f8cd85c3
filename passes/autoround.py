"""AutoRound: rounding learned block by block, from a closed-form start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..compiler.contract import LOSSY, Answer, BlockSize, Fact, Pass, Rewrite, Setting
from ..compiler.program import Program
from ..compiler.scheme import Rule
from ..compiler.view import BlockView
from ..patterns.linear import linear
from ..runtime.quantized import QuantizedLinear
from .block_rounding import LEARNED_BITS, BlockRounding, Training
from .linear_quant import block_swaps, swapped, swaps
from .sites import block_linears
from .strategies import check_methods, setting_of


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
    weight_methods = ("autoround",)
    act_methods = ("minmax", "histogram")

    iters: int = 50
    """Steps of SignSGD per block, one microbatch each."""
    enable_round_tuning: bool = True
    """Train rounding offsets."""
    enable_minmax_tuning: bool = True
    """Train scales."""
    quantized_act: bool = True
    """Put activations on their grids while training; false is the reference tool's way, weights alone."""
    quantized_input: bool = True
    """Train on what the quantized blocks before hand on; false is the reference tool's float chain."""
    strategies: tuple[str | Rule, ...] = ()
    """Formats of its own instead of the plan's scheme: ``SCHEME:GLOB|!GLOB``, the first that matches a linear wins."""
    include: tuple[str, ...] = ("*",)
    """Globs of linears."""
    exclude: tuple[str, ...] = ()
    """Globs of linears that stay as they are."""

    def __post_init__(self) -> None:
        if self.iters < 0:
            raise ValueError(f"iters={self.iters}: it must not be negative")
        check_methods(self.strategies, self)

    @property
    def training(self) -> Training:
        """The options as the training takes them."""
        return Training(self.iters, self.enable_round_tuning, self.enable_minmax_tuning, self.quantized_act)

    @property
    def needs_training(self) -> bool:
        """It runs the block with gradients."""
        return True

    @property
    def propagates_quantized(self) -> bool:
        """Whether blocks see quantized inputs."""
        return self.quantized_input

    def working_bytes(self, block: BlockSize) -> int:
        """Dense and integer weights, then the largest of three: importance, GPTQ, a step of training.

        Per learned weight training keeps 16 bytes (what the start rounded, offsets, momentum, the best state) and a
        step 32 (the graph that fakes the weight, gradients, a new state): of one linear at a time where weights are
        made again, and of the others the gradient and what is multiplied. Per token a backward pass reads inputs and
        outputs of all linears from the first learned one on. Per entry of a Hessian GPTQ takes 24 bytes (itself, in its
        order, and twice in float64).
        """
        mine = [one for one in block.linears if one.scheme is not None and one.scheme.weight is not None]
        dense = 5 * sum(one.out * one.width for one in mine)
        learned = [one for one in mine if one.scheme.weight.bits <= LEARNED_BITS]  # type: ignore[union-attr]
        if not learned:
            return dense
        sizes = [one.out * one.width for one in learned]
        hessians = [width**2 for width in dict.fromkeys(one.width for one in learned)]
        after = block.linears[block.linears.index(learned[0]) :]
        channels = sum(one.width + one.out for one in after) + block.activations
        backward = block.tokens * block.itemsize * channels
        start = 24 * max(hessians) + 24 * max(sizes)
        trained = self.training.moves
        made = (4 + block.itemsize) * sum(sizes) + 32 * max(sizes) if block.recompute else 32 * sum(sizes)
        step = made + backward if trained else 0
        held = (16 if trained else 12) * sum(sizes)
        return dense + max(backward, held + max(start + block.walked, step))

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The linears of the blocks."""
        return block_linears(program)

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per block, over all its linears that are to be quantized."""
        setting, problems = setting_of(self.strategies, program, setting)
        chosen, more = swaps(program, setting, self.include, self.exclude, self.weight_methods[0])
        return Answer(block_swaps(self.name, program, chosen), (), (*problems, *more))

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Any, QuantizedLinear]:
        """The start for every linear in the order of the dataflow, then training of all of them."""
        swaps = swapped(rewrite)
        solved = BlockRounding(swaps, view, rewrite.where).solve(self.training)
        return {swaps[name].slot: q for name, q in solved.items()}
