"""Fallback: what is heard most stays float: linears (``disable_level``, ``--fallback``), attentions (``fa_amp``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import registry
from .attention_noise import AttentionNoise
from .contract import Fact, Pass
from .device import CPU
from .edit import Verb
from .errors import Refused
from .operand import Stub
from .plan import Plan, Step, all_have_formats, make_plan
from .program import Part
from .roles import read_together, roles_of
from .solve import MICROBATCH, Progress, Solver
from .survey import float_blocks

BESIDE_INTEGERS = (Verb.WRAP, Verb.BRANCH, Verb.SWAP)
"""Edits that targets have room for at integer linears alone."""


def level(text: str) -> int:
    """The number in ``L5`` or ``5``; Refused for what is none."""
    digits = text.removeprefix("L").removeprefix("l")
    if not digits.isdecimal():
        raise Refused(f"--fallback {text}: give a number of linears, such as L5")
    return int(digits)


def quantizers(passes: Iterable[Pass]) -> list[Pass]:
    """The passes that make integers of linears and can be told to leave some."""
    return [one for one in passes if Fact.QUANTIZED in one.provides and hasattr(one, "strategies")]


def most_sensitive(
    plan: Plan, ids: Tensor, count: int, compute: torch.dtype,
    report: Callable[[Progress], None] = lambda progress: None,
) -> tuple[str, ...]:  # fmt: skip
    """The linears of the ``count`` places where rounding to nearest is loudest.

    A sweep with every quantizer replaced by ``linear_quant`` of the same formats measures the noise of each linear's
    output on the first tokens of the calibration text (``proof.TOKENS`` of them); linears that a server runs as one
    (q, k, v) are one place. Experts are not among them: those of a layer share a type.

    Args:
        plan: What is to be compiled.
        ids: Calibration tokens [n, length].
        count: How many places.
        compute: The dtype of the sweep.
        report: Told of the progress.
    """
    plain: Any = registry.get("passes", "linear_quant")
    cheap: list[Pass] = []
    for step in plan.steps:
        if step.what in quantizers([step.what]):
            own = {name: getattr(step.what, name) for name in ("strategies", "include", "exclude")}
            cheap.append(plain(**own))
        elif Fact.QUANTIZED not in step.what.provides:
            cheap.append(step.what)
    trial = make_plan(
        plan.program, cheap, scheme=None if all_have_formats(cheap) else plan.scheme, target=plan.target, tp=plan.tp,
        seed=plan.seed, run=plan.run,
    ).require()  # fmt: skip
    journal = Solver(trial, ids, lambda name, tensor: None, compute=compute, report=report).run()
    noise: dict[str, float] = {}
    for entry in journal.entries:
        noise |= entry.get("sqnr_db", {})
    for name in roles_of(plan.program)["expert"]:
        noise.pop(name, None)
    return loudest(noise, read_together(plan.program), count)


def loudest(
    noise: Mapping[str, float], together: Mapping[str, tuple[str, ...]], count: int
) -> tuple[str, ...]:
    """The linears of the ``count`` groups of least signal to noise (dB, by linear); a group is run as one."""
    groups: dict[tuple[str, ...], float] = {}
    for name, value in noise.items():
        parent = name.rpartition(".")[0]
        beside = (other for other in together.get(name, (name,)) if other in noise)
        group = tuple(other for other in beside if other.rpartition(".")[0] == parent)
        groups[group] = min(groups.get(group, value), value)
    order = sorted(groups, key=lambda group: (groups[group], group))
    return tuple(name for group in order[:count] for name in group)


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

    device = plan.run.device if plan.run else CPU
    for _ in float_blocks(plan.program, ids, max(1, MICROBATCH // ids.shape[1]), compute, watch, device):
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
        left = tuple(name for name in names if name in made)
        one: Any = step.what
        found.append(replace(one, exclude=(*one.exclude, *left)) if left and hasattr(one, "exclude") else one)
    return found
