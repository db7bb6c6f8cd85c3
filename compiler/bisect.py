"""Bisect: the first step of a plan that hurts what the model says, and the places of that step that carry most of it.

1. One solve of the plan measures the divergence of the logits after every step (``state_sweep``).
2. The places of the step that hurts are measured in groups, each group alone after the steps before it; the heaviest
   group is split until single places carry half of what the step adds. Each round solves the steps up to it again.
3. The plan without those places is measured: an answer is a plan that was tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .analyze import Score, to_exclude
from .compile import Model, Options, Passes, calibration_of, compute_dtype, filled, plan
from .contract import Pass
from .errors import Refused
from .noise_sweep import TOKENS
from .part_work import online_linears, planned_linears
from .plan import Plan
from .program import Program
from .settle import settled
from .solve import Progress, Solver
from .source import ShapesOnly
from .state_sweep import State, StateSweep, places_of

PIECES = 12
"""Groups into which places are split, and so streams that run beside the float model."""
ROUNDS = 6
"""Solves in which places are searched."""
SHARE = 0.5
"""Part of what a step adds that the places which are named carry together."""
MOST = 8
"""Places that are named."""

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class StepLoss:
    """One step of the plan, and the divergence after it."""

    number: int
    """From 1; 0 is the float model as it is stored."""
    spelling: str
    places: int
    kl: float
    """KL(float || after this step), nats per token."""
    added: float
    """By how much it is more than after the step before."""


@dataclass(frozen=True)
class PlaceLoss:
    """Places of a step that were measured together."""

    places: tuple[str, ...]
    kl: float
    """With the step at these places alone, after all steps before it; nats per token."""
    added: float
    """By how much it is more than without."""


@dataclass(frozen=True)
class Bisection:
    """What a bisection found."""

    max_kl: float | None
    tokens: int
    """On which divergences were measured."""
    dtype: str
    """In which float tensors are exported."""
    steps: tuple[StepLoss, ...]
    step: int | None
    """Number of the step that hurts: the first past ``max_kl``, or the one that adds most; None where none does."""
    groups: tuple[PlaceLoss, ...] = ()
    """Its places as far as they were told apart, the heaviest first."""
    blamed: tuple[str, ...] = ()
    """The places that carry most of what it adds."""
    without: str | None = None
    """The passes of the plan with these places left out; None where the pass has no such option."""
    kl_without: float | None = None
    """The divergence after that step then."""

    @property
    def culprit(self) -> StepLoss | None:
        """The step that hurts."""
        return None if self.step is None else self.steps[self.step]


@torch.no_grad()
def bisect(
    model: Model | Program, passes: Passes, options: Options | None = None, *, max_kl: float | None = None,
    report: Report = lambda progress: None,
) -> Bisection:  # fmt: skip
    """The first step of a plan after which the logits diverge by more than ``max_kl``, and the places that do it.

    Args:
        model: As for a compile.
        passes: As for a compile.
        options: As for a compile; the plan is solved on the same calibration data, and the divergence measured on its
            first `noise_sweep.TOKENS` tokens.
        max_kl: Nats per token; None takes the step that adds most.
        report: Told of the progress.

    Raises:
        Refused: The input or the plan is not acceptable.
        Failed: A pass broke, a failed proof above all.
    """
    if max_kl is not None and not 0 < max_kl < float("inf"):
        raise Refused(f"--max-kl {max_kl:g}: nats per token, more than 0")
    options = filled(passes, options or Options())
    planned = plan(model, passes, options, report).require()
    program = planned.program
    if isinstance(program.source, ShapesOnly):
        program.source.load(())
    ids, compute = calibration_of(program, options).tokens, compute_dtype(program, options)

    def replan(passes: Any) -> Plan:
        return plan(planned.program, list(passes), options).require()

    with torch.random.fork_rng(devices=[]):
        planned = settled(planned, options.fallback, ids, compute, replan, report)
        return _Search(planned, ids, compute, report).run(max_kl, replan)


@dataclass
class _Search:
    """One bisection of a plan."""

    plan: Plan
    ids: Tensor
    compute: torch.dtype
    report: Report

    def run(self, max_kl: float | None, replan: Callable[[Sequence[Pass]], Plan]) -> Bisection:
        """Measure the steps, then the places of the one that hurts, then the plan without them."""
        steps = self._steps()
        tokens = self._measured().numel()
        found = Bisection(max_kl, tokens, str(self.plan.dtype).removeprefix("torch."), steps, None)
        culprit = first_past(steps, max_kl)
        if culprit is None:
            return found
        step, before = self.plan.steps[culprit.number - 1], steps[culprit.number - 1].kl

        def measure(groups: Sequence[tuple[str, ...]]) -> list[PlaceLoss]:
            states = [State(step.index, frozenset(group)) for group in groups]
            kls = self._divergences(self.plan, states)
            return [PlaceLoss(group, kl, kl - before) for group, kl in zip(groups, kls, strict=True)]

        whole = PlaceLoss(places_of(step), culprit.kl, culprit.added)
        groups = heaviest(whole, measure)
        blamed = carriers(groups, culprit.added)
        found = replace(found, step=culprit.number, groups=groups, blamed=blamed)
        other = _left_out(self.plan, step.index, blamed, replan)
        if other is None:
            return found
        (kl,) = self._divergences(other, [State(step.index, frozenset(places_of(other.steps[step.index])))])
        return replace(found, without=_spelled(other), kl_without=kl)

    def _steps(self) -> tuple[StepLoss, ...]:
        places = [places_of(step) for step in self.plan.steps]
        states = [State(index, frozenset(names)) for index, names in enumerate(places)]
        kls = self._divergences(self.plan, [State(0, frozenset()), *states])
        losses = [StepLoss(0, "", 0, kls[0], kls[0])]
        for step, names, kl in zip(self.plan.steps, places, kls[1:], strict=True):
            losses.append(StepLoss(step.index + 1, str(step.what), len(names), kl, kl - losses[-1].kl))
        return tuple(losses)

    def _measured(self) -> Tensor:
        return self.ids[: max(1, TOKENS // self.ids.shape[1])]

    def _divergences(self, planned: Plan, states: Sequence[State]) -> list[float]:
        """Nats per token of each state, in one solve of the steps that any of them needs."""
        short = up_to(planned, max(state.step for state in states))
        solver = Solver(short, self.ids, _nowhere, compute=self.compute, report=self.report)
        solver.planned, solver.online = planned_linears(planned), online_linears(planned)
        sweep = StateSweep(short, states, self._measured(), self.compute, solver.exported, self.report)
        solver.on_step = sweep
        solver.run()
        return sweep.divergences


def up_to(planned: Plan, index: int) -> Plan:
    """The plan that ends with a step."""
    if index == len(planned.steps) - 1:
        return planned
    following = planned.steps[index + 1]
    return replace(planned, steps=planned.steps[: index + 1], final=following.program, bases=following.bases)


def first_past(steps: Sequence[StepLoss], max_kl: float | None) -> StepLoss | None:
    """The first step after which the divergence is more than ``max_kl``; for None the one that adds most."""
    real = steps[1:]
    if max_kl is None:
        most = max(real, key=lambda step: step.added)
        return most if most.added > 0 else None
    return next((step for step in real if step.kl > max_kl), None)


def heaviest(
    whole: PlaceLoss, measure: Callable[[Sequence[tuple[str, ...]]], list[PlaceLoss]]
) -> tuple[PlaceLoss, ...]:
    """Groups of the places of a step, the heaviest first, split until single places carry `SHARE` of it.

    Args:
        whole: All places together.
        measure: What each of some groups of places adds.
    """
    found = [whole]
    for _ in range(ROUNDS):
        groups = [group for group in found if len(group.places) > 1]
        singles = [group for group in found if len(group.places) == 1]
        top = max(found, key=lambda group: group.added)
        carried = sum(group.added for group in singles)
        if not groups or (len(top.places) == 1 and carried >= SHARE * whole.added):
            break
        split = max(groups, key=lambda group: group.added)
        found.remove(split)
        found += measure(pieces(split.places))
    return tuple(sorted(found, key=lambda group: -group.added))


def pieces(places: tuple[str, ...]) -> list[tuple[str, ...]]:
    """At most `PIECES` runs of places that differ in length by at most one."""
    count = min(PIECES, len(places))
    ends = [round(k * len(places) / count) for k in range(count + 1)]
    return [places[start:end] for start, end in itertools.pairwise(ends)]


def carriers(groups: Sequence[PlaceLoss], added: float) -> tuple[str, ...]:
    """The heaviest single places that carry `SHARE` of what a step adds; none where more than `MOST` would be it."""
    singles = [group for group in groups if len(group.places) == 1][:MOST]
    for count in range(1, len(singles) + 1):
        if sum(group.added for group in singles[:count]) >= SHARE * added:
            return tuple(group.places[0] for group in singles[:count])
    return ()


def _left_out(
    planned: Plan, index: int, places: Sequence[str], replan: Callable[[Sequence[Pass]], Plan]
) -> Plan | None:
    """The plan with places left out of one step by its ``exclude``; None where that cannot be said."""
    step = planned.steps[index]
    one: Any = step.what
    if not places or not hasattr(one, "exclude"):
        return None
    modules = [
        name for rewrite in step.answer.rewrites if rewrite.where in places for name in rewrite.modules
    ]
    scores = [Score(place, 0.0) for place in places]
    choices = [to_exclude(step.program, scores, "linear", len(scores)), modules]
    for globs in choices:
        passes = [other.what for other in planned.steps]
        passes[index] = replace(one, exclude=(*one.exclude, *dict.fromkeys(globs)))
        try:
            other = replan(passes)
        except Refused:
            continue
        if not set(places) & set(places_of(other.steps[index])):
            return other
    return None


def _spelled(planned: Plan) -> str:
    return ",".join(str(step.what) for step in planned.steps)


def _nowhere(name: str, tensor: Tensor) -> None:
    """A bisection writes nothing."""
