"""A bisection as a person reads it, and for machines."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .bisect import MOST, Bisection, PlaceLoss

HEAVIEST = 5
"""Groups of places that are shown."""
WIDTH = 48
"""Longest spelling of a pass in the table."""


def bisect_text(found: Bisection) -> str:
    """The divergence after every step, the step that hurts, its heaviest places, and the plan without them."""
    spellings = [_shortened(f"{step.number}. {step.spelling}") for step in found.steps[1:]]
    spellings.insert(0, f"0. stored as {found.dtype}")
    width = max(map(len, spellings))
    lines = [
        f"KL from the float model in nats per token, on {found.tokens} tokens of the calibration text",
        "",
        f"   {'after':{width}}  {'KL':>9}  {'added':>9}  places",
    ]
    for step, spelling in zip(found.steps, spellings, strict=True):
        mark = "->" if step.number == found.step else "  "
        added, places = (f"{step.added:.3g}", str(step.places)) if step.number else ("", "")
        lines.append(f"{mark} {spelling:{width}}  {step.kl:9.3g}  {added:>9}  {places}".rstrip())
    return "\n".join([*lines, "", *_verdict(found)])


def _verdict(found: Bisection) -> list[str]:
    culprit = found.culprit
    if culprit is None:
        last = found.steps[-1]
        if found.max_kl is None:
            return ["no step adds anything"]
        most = max(found.steps[1:], key=lambda step: step.kl)
        ends = f"the plan ends at {last.kl:.3g}"
        if most is not last:
            ends += f", and the most is {most.kl:.3g} after step {most.number}"
        return [f"no step passes --max-kl {found.max_kl:g}: {ends}"]
    before = found.steps[culprit.number - 1]
    why = "adds most" if found.max_kl is None else f"is the first past --max-kl {found.max_kl:g}"
    lines = [
        f"step {culprit.number}, {culprit.spelling.partition('{')[0]}, {why}: {before.kl:.3g} becomes {culprit.kl:.3g}"
    ]
    if culprit.places > 1:
        lines += ["", "what it adds at some of its places alone:"]
        lines += [f"  {group.added:9.3g}  {_named(group)}" for group in found.groups[:HEAVIEST]]
        if left := found.groups[HEAVIEST:]:
            lines.append(
                f"             and {sum(len(group.places) for group in left)} places more, "
                f"{sum(group.added for group in left):.3g} together"
            )
    if found.blamed:
        lines += ["", f"most of it: {', '.join(found.blamed)}"]
    else:
        lines += ["", f"it is spread: no {MOST} places carry half of it; take another pass or more bits"]
    if found.without is not None and found.kl_without is not None:
        lines += [
            f"left out, step {culprit.number} ends at {found.kl_without:.3g}:",
            f'  --passes "{found.without}"',
        ]
    elif found.blamed:
        lines.append("its pass cannot leave them out: put another one in its place, or leave the step out")
    return lines


def _shortened(spelling: str) -> str:
    return spelling if len(spelling) <= WIDTH else f"{spelling[: WIDTH - 3]}..."


def _named(group: PlaceLoss) -> str:
    if len(group.places) == 1:
        return group.places[0]
    return f"{group.places[0]} to {group.places[-1]} ({len(group.places)} places)"


def bisect_json(found: Bisection) -> dict[str, Any]:
    """All numbers; a divergence that is not finite is null."""
    return _finite(dataclasses.asdict(found))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
