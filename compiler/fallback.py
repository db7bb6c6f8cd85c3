"""Fallback: what costs most stays float: linears (``disable_level``, ``--fallback``), attentions (``fa_amp``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import registry
from .attention_noise import AttentionNoise
from .contract import Fact, Pass
from .edit import BESIDE_INTEGERS
from .errors import Refused
from .menu import Place
from .noise_sweep import TOKENS, NoiseSweep
from .operand import Quantize, Stub
from .plan import Plan, Step, all_have_formats, make_plan
from .program import Part
from .roles import read_together, roles_of
from .scheme import LinearScheme
from .solve import MICROBATCH, Progress, Solver
from .survey import float_blocks


def level(text: str) -> int:
    """The number in ``L5`` or ``5``; Refused for what is none."""
    digits = text.removeprefix("L").removeprefix("l")
    if not digits.isdecimal():
        raise Refused(f"--fallback {text}: give a number of linears, such as L5")
    return int(digits)


def quantizers(passes: Iterable[Pass]) -> list[Pass]:
    """The passes that make integers of linears and can be told to leave some."""
    return [one for one in passes if Fact.QUANTIZED in one.provides and hasattr(one, "strategies")]


@dataclass(frozen=True)
class Left:
    """What stays float, and what rounding it would have cost."""

    linears: tuple[str, ...]
    saved: float
    """Nats per token, rounding to nearest."""
    total: float
    """Nats per token that all places of the plan cost."""

    def __str__(self) -> str:
        return (
            f"{', '.join(self.linears)} stay float, where rounding costs most: about {self.saved:.2g} of"
            f" {self.total:.2g} nats per token"
        )


def most_sensitive(
    plan: Plan, ids: Tensor, count: int, compute: torch.dtype,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Left:  # fmt: skip
    """The linears of the ``count`` places that cost most when they are rounded to nearest in their formats.

    What a place costs is measured as for the choice of formats (``noise_sweep``), after the float rewrites of the plan.
    Linears that a server runs as one (q, k, v) are one place. Experts are not among them: those of a layer share a
    type.

    Args:
        plan: What is to be compiled.
        ids: Calibration tokens [n, length]; the first `TOKENS` are used.
        count: How many places.
        compute: The dtype of the sweep.
        report: Told of the progress.

    Raises:
        Refused: There are fewer places, or nothing would be left to quantize.
    """
    places = _places(plan)
    every = sum(len(place.linears) for place in places) == len(_formats(plan))
    if count > len(places) - every:
        raise Refused(
            f"--fallback L{count}: the plan quantizes {len(places)} places besides experts"
            + (", and one at least has to stay quantized" if every and places else "")
            + f"; give at most L{max(len(places) - every, 0)}"
        )
    ids = ids[: max(1, TOKENS // ids.shape[1])]
    trial = _rounded_to_nearest(plan)
    program = next(step.program for step in trial.steps if Fact.QUANTIZED in step.what.provides)
    noise = NoiseSweep(program, places, ids, compute, report, plan.device)
    Solver(trial, ids, lambda name, tensor: None, compute=compute, report=report, watch=noise).run()
    costs = [cost for (cost,) in noise.costs()]
    order = sorted(range(len(places)), key=lambda i: (-costs[i], places[i].linears))[:count]
    return Left(
        tuple(name for i in order for name in places[i].linears), sum(costs[i] for i in order), sum(costs)
    )


def _rounded_to_nearest(plan: Plan) -> Plan:
    """The plan with each quantizer replaced by ``linear_quant`` of the same formats."""
    plain: Any = registry.get("passes", "linear_quant")
    cheap: list[Pass] = []
    for step in plan.steps:
        if step.what in quantizers([step.what]):
            own = {name: getattr(step.what, name) for name in ("strategies", "include", "exclude")}
            cheap.append(plain(**own))
        elif Fact.QUANTIZED not in step.what.provides:
            cheap.append(step.what)
    return make_plan(
        plan.program, cheap, scheme=None if all_have_formats(cheap) else plan.scheme, target=plan.target, tp=plan.tp,
        seed=plan.seed, run=plan.run,
    ).require()  # fmt: skip


def _formats(plan: Plan) -> dict[str, LinearScheme]:
    """The linears that a plan quantizes, with their formats."""
    edits = (edit for step in plan.steps for rewrite in step.answer.rewrites for edit in rewrite.edits)
    return {e.site.module: e.operand.scheme for e in edits if isinstance(e.operand, Quantize)}


def _places(plan: Plan) -> list[Place]:
    """The linears that a plan quantizes, those together that a server runs as one, in the order of the graph."""
    experts, formats = roles_of(plan.program)["expert"], _formats(plan)
    together = read_together(plan.program)
    places: dict[tuple[str, ...], Place] = {}
    for node in plan.program.graph.nodes:
        name = str(node.target)
        if node.op != "call_module" or name not in formats or name in experts:
            continue
        parent = name.rpartition(".")[0]
        group = tuple(
            other
            for other in together.get(name, (name,))
            if formats.get(other) == formats[name] and other.rpartition(".")[0] == parent
        )
        places[group] = Place(group, node.meta["part"], (formats[name],), (0,))
    return list(places.values())


def loudest_attentions(
    plan: Plan, step: Step, ids: Tensor, compute: torch.dtype, report: Callable[[Progress], None]
) -> list[str]:
    """The attentions of a step that puts q, k and v on grids, those first whose outputs the grids change most.

    The float model runs once, and every attention is computed again as its stubs have it.
    """
    grids: dict[str, dict[int, str]] = {}
    modules: dict[str, str] = {}
    for rewrite in step.answer.rewrites:
        for edit in rewrite.edits:
            if isinstance(edit.operand, Stub):
                grids.setdefault(edit.operand.node, {})[edit.operand.operand] = edit.operand.scope
                modules[edit.operand.node] = rewrite.where
    noise = AttentionNoise(grids)

    def watch(part: Part) -> tuple[None, AttentionNoise]:
        report(Progress(part.name, part.index, len(plan.program.parts), f"{step.what.name} fallback"))
        return None, noise

    for _ in float_blocks(plan.program, ids, max(1, MICROBATCH // ids.shape[1]), compute, watch, plan.device):
        pass
    errors = noise.errors()
    return list(
        dict.fromkeys(modules[name] for name in sorted(errors, key=lambda name: (-errors[name], name)))
    )


def attentions_to_leave(plan: Plan) -> int:
    """How many attentions passes of a plan leave float, once they know which (``fa_amp``)."""
    return sum(int(step.what.options().get("fa_amp", 0)) for step in plan.steps)


def without(steps: Iterable[Step], names: tuple[str, ...]) -> list[Pass]:
    """The passes of a plan, each of which leaves alone what it would make beside the integers of these linears."""
    found: list[Pass] = []
    for step in steps:
        edits = [edit for rewrite in step.answer.rewrites for edit in rewrite.edits]
        made = {edit.site.module for edit in edits if edit.verb in BESIDE_INTEGERS}
        one: Any = step.what
        every = bool(quantizers([one]))  # what one quantizer leaves, the next would take
        left = tuple(name for name in names if every or name in made)
        found.append(replace(one, exclude=(*one.exclude, *left)) if left and hasattr(one, "exclude") else one)
    return found
