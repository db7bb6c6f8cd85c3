"""Round-to-nearest quantization of linears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..compiler.contract import LOSSY, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Quantize, Slot, Statistic
from ..compiler.pattern import Site
from ..compiler.program import Program
from ..compiler.scheme import Rule, matches
from ..compiler.view import BlockView
from ..patterns.linear import linear
from ..runtime.quantized import QuantizedLinear
from .act_range import STATISTICS, static_range
from .minmax import rounded_weight, scale_dtype
from .sites import block_linears, width_in, width_out
from .strategies import check_methods, setting_of
from .weight_scale import weight_grid

NEEDS = {"clip": "meansquare"}
"""Weight methods that ask for a statistic of the input."""


def swaps(
    program: Program, setting: Setting, include: tuple[str, ...], exclude: tuple[str, ...],
    weight_method: str = "minmax", act_method: str = "minmax",
) -> tuple[dict[str, Quantize], tuple[str, ...]]:  # fmt: skip
    """The block linears that a quantizing pass takes, and the problems: linears that an earlier one took are left.

    The methods are those of rules that name none.
    """
    chosen: dict[str, Quantize] = {}
    problems: list[str] = []
    taken = {str(node.target) for node in program.graph.nodes if "scheme" in node.meta}
    for name in block_linears(program):
        rule: Rule | None = setting.scheme.rule(name, setting.roles)
        if name in taken or rule is None or not rule.scheme.quantized:
            continue
        if not matches(name, include) or matches(name, exclude):
            continue
        scheme, width = rule.scheme, width_in(program, name)
        assert scheme.weight is not None
        if scheme.weight.group and width % scheme.weight.group:
            problems.append(f"{name}: the group size {scheme.weight.group} does not divide its width {width}")
            continue
        if not scheme.weight.symmetric and (rule.weight_method or weight_method) == "ssz":
            problems.append(
                f"{name}: ssz finds scales of symmetric weights, and {scheme} is asymmetric: take clip"
            )
            continue
        by_weight, by_act = rule.weight_method or weight_method, rule.act_method or act_method
        kinds = [STATISTICS[by_act]] * scheme.ranged + ([NEEDS[by_weight]] if by_weight in NEEDS else [])
        needs = tuple(Statistic(kind, name) for kind in kinds)
        slot = Slot(f"{name}/integers", (width_out(program, name), width), needs)
        chosen[name] = Quantize(scheme, slot, by_weight, by_act)
    return chosen, tuple(problems)


def block_swaps(name: str, program: Program, chosen: Mapping[str, Quantize]) -> tuple[Rewrite, ...]:
    """One rewrite of the pass ``name`` per block, over all linears that are chosen there."""
    parts = block_linears(program)
    by_block: dict[int, list[Edit]] = {}
    for linear_name, operand in chosen.items():
        by_block.setdefault(parts[linear_name], []).append(Edit(Verb.SWAP, Site(linear_name), operand))
    names = {part.index: part.name for part in program.parts}
    return tuple(
        Rewrite(name, "linear", names[index], tuple(edits), LOSSY) for index, edits in by_block.items()
    )


def swapped(rewrite: Rewrite) -> dict[str, Quantize]:
    """The linears that a rewrite replaces, and by what."""
    return {edit.site.module: edit.operand for edit in rewrite.edits if isinstance(edit.operand, Quantize)}


@dataclass(frozen=True, kw_only=True)
class LinearQuant(Pass):
    """Quantize linears by rounding to nearest.

    **Why.** The baseline, and enough for 8 bits once outliers are smoothed.

    **Before / after.** ``W x`` becomes ``s_w s_x (W_q x_q)``: weights per channel or group,
    activations per token while the model runs, or per tensor from calibration. ``weight_method`` and
    ``act_method`` say how scales are found.

    **Source.** The recipe's ``linear_quant``; ranges as in ONNX's QuantizeLinear; ``clip`` is the clip search of AWQ
    (arXiv 2306.00978).
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
    weight_methods = ("minmax", "ssz", "clip")
    act_methods = ("minmax", "histogram")

    weight_method: Literal["minmax", "ssz", "clip"] = "minmax"
    """Scales of weights: the largest weight, alternating least squares, or a clip search weighed by the inputs."""
    act_method: Literal["minmax", "histogram"] = "minmax"
    """Ranges of static activations: lowest and highest, or those of least square error."""
    strategies: tuple[str | Rule, ...] = ()
    """Formats of its own instead of the plan's scheme: ``SCHEME:GLOB|!GLOB``, the first that matches a linear wins."""
    include: tuple[str, ...] = ("*",)
    """Globs of linears."""
    exclude: tuple[str, ...] = ()
    """Globs of linears that stay as they are."""

    def __post_init__(self) -> None:
        for option, known in (("weight_method", self.weight_methods), ("act_method", self.act_methods)):
            if getattr(self, option) not in known:
                raise ValueError(f"{option}={getattr(self, option)}: it is one of {', '.join(known)}")
        check_methods(self.strategies, self)

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The linears of the blocks."""
        return block_linears(program)

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per linear that its scheme quantizes."""
        setting, problems = setting_of(self.strategies, program, setting)
        chosen, more = swaps(
            program, setting, self.include, self.exclude, self.weight_method, self.act_method
        )
        rewrites = tuple(
            Rewrite(self.name, "linear", name, (Edit(Verb.SWAP, Site(name), operand),), LOSSY)
            for name, operand in chosen.items()
        )
        ranged = any(operand.scheme.ranged for operand in chosen.values())
        if self.act_method != "minmax" and chosen and not ranged:
            more = (
                *more,
                f"act_method={self.act_method}: no linear that it takes has a static activation: leave it out",
            )
        return Answer(rewrites, (), (*problems, *more))

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Slot, QuantizedLinear]:
        """Integers from the weight's range, and for static activations the range of the input."""
        (edit,) = rewrite.edits
        assert isinstance(edit.operand, Quantize)
        name, operand = edit.site.module, edit.operand
        scheme, statistics = operand.scheme, {need.kind: view.statistic(need) for need in operand.slot.needs}
        scale, offset = static_range(statistics, operand, view.export_dtype)
        grid = found_grid(view, name, operand, statistics.get("meansquare"))
        return {
            operand.slot: rounded_weight(
                view, name, scheme, grid=grid, input_scale=scale, input_offset=offset
            )
        }


def found_grid(
    view: BlockView, name: str, operand: Quantize, square: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets [out, groups] by the method of the operand."""
    weight = operand.scheme.weight
    assert weight is not None
    held = scale_dtype(view, name, operand.scheme)
    return weight_grid(view.weight(name), weight, held, operand.weight_method, square)
