"""Round-to-nearest quantization of linears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..compiler.contract import LOSSY, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Quantize, Slot, Statistic
from ..compiler.pattern import Site
from ..compiler.program import Program
from ..compiler.scheme import LinearScheme, Rule, matches
from ..compiler.view import BlockView
from ..patterns.linear import linear
from ..runtime.quantized import QuantizedLinear
from .minmax import input_range, minmax_weight
from .sites import block_linears, width_in, width_out
from .strategies import own_scheme, setting_of


def swaps(
    program: Program, setting: Setting, include: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[dict[str, Quantize], tuple[str, ...]]:
    """The block linears that a quantizing pass takes, and the problems: linears that an earlier one took are left."""
    chosen: dict[str, Quantize] = {}
    problems: list[str] = []
    taken = {str(node.target) for node in program.graph.nodes if "scheme" in node.meta}
    for name in block_linears(program):
        scheme: LinearScheme = setting.scheme.of(name, setting.roles)
        if name in taken or not scheme.quantized or not matches(name, include) or matches(name, exclude):
            continue
        assert scheme.weight is not None
        width = width_in(program, name)
        if scheme.weight.group and width % scheme.weight.group:
            problems.append(f"{name}: the group size {scheme.weight.group} does not divide its width {width}")
            continue
        needs = (Statistic("range", name),) if scheme.static else ()
        chosen[name] = Quantize(scheme, Slot(f"{name}/integers", (width_out(program, name), width), needs))
    return chosen, tuple(problems)


@dataclass(frozen=True, kw_only=True)
class LinearQuant(Pass):
    """Quantize linears by rounding to nearest, with minimum-maximum ranges.

    **Why.** The baseline, and enough for 8 bits once outliers are smoothed.

    **Before / after.** ``W x`` becomes ``s_w s_x (W_q x_q)``: weights per channel or group,
    activations per token while the model runs, or per tensor from calibration.

    **Source.** The recipe's ``linear_quant`` with method ``minmax``; ranges as in ONNX's QuantizeLinear.
    """

    name = "linear_quant"
    summary = "replace linears by integer ones, rounding to nearest"
    patterns = (linear,)
    requires = frozenset()
    provides = frozenset({Fact.QUANTIZED})
    breaks = frozenset()
    before = {}
    after = {}
    claim = LOSSY
    weight_methods = ("minmax",)

    strategies: tuple[str | Rule, ...] = ()
    """Formats of its own instead of the plan's scheme: ``SCHEME:GLOB|!GLOB``, the first that matches a linear wins."""
    include: tuple[str, ...] = ("*",)
    """Globs of linears."""
    exclude: tuple[str, ...] = ()
    """Globs of linears that stay as they are."""

    def __post_init__(self) -> None:
        own_scheme(self.strategies)

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The linears of the blocks."""
        return block_linears(program)

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per linear that its scheme quantizes."""
        setting, problems = setting_of(self.strategies, program, setting)
        chosen, more = swaps(program, setting, self.include, self.exclude)
        rewrites = tuple(
            Rewrite(self.name, "linear", name, (Edit(Verb.SWAP, Site(name), operand),), LOSSY)
            for name, operand in chosen.items()
        )
        return Answer(rewrites, (), (*problems, *more))

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Slot, QuantizedLinear]:
        """Integers from the weight's range, and for static activations the range of the input."""
        (edit,) = rewrite.edits
        assert isinstance(edit.operand, Quantize)
        name, scheme, slot = edit.site.module, edit.operand.scheme, edit.operand.slot
        scale, offset = None, None
        if scheme.static:
            scale, offset = input_range(view.statistic(slot.needs[0]), scheme, view.export_dtype)
        return {slot: minmax_weight(view, name, scheme, input_scale=scale, input_offset=offset)}
