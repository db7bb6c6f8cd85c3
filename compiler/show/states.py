"""States of a program: as it was captured, or as the passes of a plan leave it, up to one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .. import registry
from ..contract import Rewrite
from ..errors import Refused
from ..plan import Plan
from ..program import Part, Program
from ..spelling import one
from .matched import MARKED, Matched, matched


@dataclass(frozen=True)
class State:
    """A program that is to be shown, and how it came about."""

    program: Program
    plan: Plan | None = None
    steps: int = 0
    """How many passes of the plan were applied."""

    @property
    def original(self) -> Program:
        """The program before all passes."""
        return self.program if self.plan is None else self.plan.program

    @property
    def rewrites(self) -> tuple[Rewrite, ...]:
        """What passes did, in order."""
        steps = () if self.plan is None else self.plan.steps[: self.steps]
        return tuple(rewrite for step in steps for rewrite in step.answer.rewrites)

    def matches(self, names: Iterable[str] | None = None, parts: Iterable[Part] = ()) -> tuple[Matched, ...]:
        """The matches that are highlighted: those of the model before all passes.

        The residual stream is one space only once norm gains are fused: it is looked for where the pass that rotated it
        found it.

        Args:
            names: Patterns; None is `MARKED`.
            parts: Blocks of which matches are wanted, beside the first ones of runs.
        """
        names, parts = tuple(names or MARKED), tuple(parts)
        here = [name for name in names if name != "residual"]
        found = matched(self.original, here, parts) if here else ()
        return found + (matched(self._rotated, ["residual"], parts) if "residual" in names else ())

    @property
    def _rotated(self) -> Program:
        steps = () if self.plan is None else self.plan.steps[: self.steps]
        return next(
            (step.program for step in steps if any(r.pattern == "residual" for r in step.answer.rewrites)),
            self.original,
        )


def state_after(plan: Plan, steps: int) -> State:
    """The program after so many passes of a plan."""
    program = plan.steps[steps].program if steps < len(plan.steps) else plan.final
    return State(program, plan, steps)


def steps_named(plan: Plan, name: str, option: str) -> range:
    """Indices of the steps of a plan that a name stands for: a pass, a preset, or a number as ``qc plan`` prints it.

    Raises:
        Refused: There is no such step, or there are several.
    """
    names = [step.what.name for step in plan.steps]
    numbered = ", ".join(f"{i} {known}" for i, known in enumerate(names, 1))
    if name.isdigit():
        if not 1 <= int(name) <= len(names):
            raise Refused(f"{option} {name}: the plan has the steps {numbered}")
        return range(int(name) - 1, int(name))
    places = [i for i, known in enumerate(names) if known == name]
    length = 1
    if not places and name in registry.names("presets"):
        inside = [found.name for found in one(name)]
        length = len(inside)
        places = [i for i in range(len(names)) if names[i : i + length] == inside]
    if not places:
        there = ", ".join(dict.fromkeys(names))
        hint = registry.unknown("step", name, dict.fromkeys(names))
        raise Refused(f"{option}: {hint}" + ("" if "there are" in hint else f" The plan has {there}"))
    if len(places) > 1:
        numbers = " and ".join(str(place + 1) for place in places)
        raise Refused(f"{option} {name}: it stands in the plan at {numbers}: give the number")
    return range(places[0], places[0] + length)
