"""A choice of formats as a person reads it: the trade-off with the chosen point, and the places that cost most."""

from __future__ import annotations

from typing import Any

from .chart import tradeoff
from .choose import Choice

COSTLIEST = 5
"""Places that are named."""


def choice_text(choice: Choice) -> str:
    """A table of the curve and the costliest places."""
    lines = [
        f"formats chosen by {choice.asked}",
        "",
        "      bits   KL predicted   KL measured (rounding to nearest)",
    ]
    for point in choice.points:
        mark = "->" if point == choice.point else "  "
        measured = "" if point.measured is None else f"{point.measured:.3g}"
        lines.append(f"   {mark}{point.bits:6.2f}   {point.predicted:<12.3g}   {measured}".rstrip())
    lines += ["", "what costs most, in nats per token:"]
    lines += [f"  {cost:9.3g}  {name} as {format}" for name, format, cost in choice.costs[:COSTLIEST]]
    return "\n".join(lines) + "\n"


def choice_json(choice: Choice) -> dict[str, Any]:
    """The same for machines, with every place."""
    return {
        "asked": choice.asked,
        "chosen": _point(choice.point),
        "curve": [_point(point) for point in choice.points],
        "linears": dict(choice.counts),
        "places": [{"linears": name, "format": format, "kl": cost} for name, format, cost in choice.costs],
    }


def choice_svg(choice: Choice) -> str:
    """The curve as a chart."""
    points = [(p.bits, p.predicted) for p in choice.points]
    dots = [(p.bits, p.measured) for p in choice.points if p.measured is not None]
    best = choice.point.measured if choice.point.measured is not None else choice.point.predicted
    return tradeoff(f"Formats chosen by {choice.asked}", points, dots, (choice.point.bits, best))


def _point(point: Any) -> dict[str, Any]:
    return {"bits_per_weight": point.bits, "kl_predicted": point.predicted, "kl_measured": point.measured}
