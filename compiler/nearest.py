"""Nearest: the linears of a part as ``linear_quant`` would round them, for whoever wants to know what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..runtime.quantized import QuantizedLinear
from . import registry
from .operand import Quantize, Statistic
from .plan import Plan, make_plan
from .program import Program
from .recipe_yaml import globs
from .scheme import LinearScheme, Rule, Scheme
from .view import BlockView


def rounding_plan(program: Program, scheme: Scheme) -> Plan:
    """``linear_quant`` alone, in a layout that holds every format."""
    rounding: Any = registry.get("passes", "linear_quant")
    return make_plan(program, [rounding()], scheme=scheme, target="modelslim").require()


def alone(program: Program, linears: Iterable[str], one: LinearScheme) -> Scheme:
    """A format for some linears of a program, and none for the others."""
    every = [name for name, leaf in program.leaves.items() if leaf.kind == "linear"]
    return Scheme(one.spelling, (Rule(include=tuple(globs(linears, every)), scheme=one),))


class Nearest:
    """Rounding to nearest in a scheme. ``program`` has no integer linears yet."""

    def __init__(self, program: Program, scheme: Scheme) -> None:
        (step,) = rounding_plan(program, scheme).steps
        self.what, self.program = step.what, program
        self.rewrites = {rewrite.where: rewrite for rewrite in step.answer.rewrites}

    def needs(self, name: str) -> tuple[Statistic, ...]:
        """What has to be seen of the input of a linear."""
        found = self.rewrites.get(name)
        return tuple(need for slot in found.slots for need in slot.needs) if found is not None else ()

    def of(
        self,
        part: str,
        tensors: Mapping[str, Tensor],
        names: Iterable[str],
        statistics: Mapping[Statistic, Tensor],
    ) -> tuple[dict[str, QuantizedLinear], dict[str, LinearScheme]]:
        """Integers and schemes of those linears of a part, on its float32 tensors, that the scheme quantizes."""
        turned = frozenset(name for name, leaf in self.program.leaves.items() if leaf.transposed)
        view = BlockView(part, tensors, statistics, torch.float32, 0, transposed=turned)
        quantized, schemes = {}, {}
        for name in names:
            if (rewrite := self.rewrites.get(name)) is not None:
                (edit,) = rewrite.edits
                assert isinstance(edit.operand, Quantize)
                quantized[name] = self.what.solve(rewrite, view)[edit.operand.slot]
                schemes[name] = edit.operand.scheme
        return quantized, schemes
