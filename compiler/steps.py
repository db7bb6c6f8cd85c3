"""The steps of a plan by name or number, and the program after each."""

from __future__ import annotations

from collections.abc import Iterable

from . import registry
from .errors import Refused
from .plan import Plan
from .program import Program


def steps_named(plan: Plan, asked: Iterable[str]) -> list[int]:
    """Indices of the steps that are asked for, in the order of the plan: a name, a number from 1, or ``all``.

    Raises:
        Refused: The plan has no such step.
    """
    names = [step.what.name for step in plan.steps]
    found: set[int] = set()
    for one in asked:
        if one == "all":
            found |= set(range(len(names)))
        elif one.isdecimal() and 1 <= int(one) <= len(names):
            found.add(int(one) - 1)
        elif one in names:
            found |= {index for index, name in enumerate(names) if name == one}
        else:
            there = ", ".join(f"{index}. {name}" for index, name in enumerate(names, 1))
            close = registry.close(one, names)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise Refused(f"the plan has no step {one!r}: {hint}its steps are {there}")
    return sorted(found)


def after(plan: Plan, index: int) -> Program:
    """The program after a step."""
    return plan.steps[index + 1].program if index + 1 < len(plan.steps) else plan.final
