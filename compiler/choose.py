"""Choose: which number format each linear gets, by measured error, within a budget of bits or of divergence.

1. ``menu``: the places and formats that passes and target allow.
2. ``noise_sweep``: what each format of each place costs in nats per token, rounding to nearest.
3. ``allocation``: the best choice for every number of bits, as one curve.
4. ``trial_sweep``: points of the curve measured whole, since costs add up only roughly; ``max_kl`` counts what is
   measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import registry
from .allocation import Curve, curve
from .contract import Fact
from .edit import BESIDE_INTEGERS
from .errors import Refused
from .menu import DEFAULT, Menu, formats_of, menu_of
from .noise_sweep import TOKENS, NoiseSweep
from .operand import Stub
from .plan import Plan, all_have_formats, make_plan
from .recipe_yaml import globs
from .scheme import FLOAT, Rule, Scheme
from .solve import Progress, Solver
from .trial_sweep import TrialSweep

POINTS = 5
"""Points of the curve that are measured in one sweep."""
ROUNDS = 4
"""Sweeps in which a divergence is searched."""


@dataclass(frozen=True)
class Point:
    """One choice for all places."""

    bits: float
    """Per weight of the block linears, scales counted."""
    predicted: float
    """Nats per token, the sum over places."""
    measured: float | None = None
    """Nats per token of the whole model rounded to nearest; None where nobody measured."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what else there was."""

    asked: str
    scheme: Scheme
    point: Point
    points: tuple[Point, ...]
    """The trade-off, fewest bits first; the chosen point is among them."""
    counts: tuple[tuple[str, int], ...]
    """Format and number of linears."""
    costs: tuple[tuple[str, str, float], ...]
    """Place, chosen format, and what it costs in nats per token, the costliest first."""

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in self.counts)
        return (
            f"{self.asked}: {kinds}; {self.point.bits:.2f} bits per weight, KL {self.point.measured:.3g} nats per token"
            f" rounded to nearest ({self.point.predicted:.3g} predicted)"
        )


def check_asked(avg_bits: float | None, max_kl: float | None, choose_from: str | None) -> None:
    """Refused for a budget that says nothing."""
    if avg_bits is not None and max_kl is not None:
        raise Refused("--avg-bits and --max-kl are two budgets: give one of them")
    if avg_bits is not None and not 0 < avg_bits <= 16:
        raise Refused(f"--avg-bits {avg_bits:g}: bits per weight, more than 0 and at most 16")
    if max_kl is not None and not 0 < max_kl < float("inf"):
        raise Refused(f"--max-kl {max_kl:g}: nats per token, more than 0")
    if choose_from is not None:
        if avg_bits is None and max_kl is None:
            raise Refused("--choose-from says among what: say how many bits with --avg-bits or --max-kl")
        formats_of(choose_from)


def chosen(
    planned: Callable[[Scheme | None], Plan], choose_from: str | None, ids: Tensor, *, avg_bits: float | None,
    max_kl: float | None, compute: torch.dtype, report: Callable[[Progress], None] = lambda progress: None,
) -> Plan:  # fmt: skip
    """The plan in the formats that ``choose`` finds; ``choose_from`` None is `menu.DEFAULT`.

    Raises:
        Refused: The passes have formats of their own and would not read these, and what ``choose`` refuses.
    """
    if all_have_formats(step.what for step in planned(None).steps):
        raise Refused(
            "the quantizing passes have formats of their own: leave their strategies out to have formats chosen"
        )
    choice = choose(
        planned, choose_from or DEFAULT, ids, avg_bits=avg_bits, max_kl=max_kl, compute=compute, report=report
    )
    found = planned(choice.scheme)
    return replace(found, notes=(*found.notes, f"chosen by {choice}"), choice=choice)


@torch.no_grad()
def choose(
    planned: Callable[[Scheme], Plan], choose_from: str, ids: Tensor, *, avg_bits: float | None, max_kl: float | None,
    compute: torch.dtype, report: Callable[[Progress], None] = lambda progress: None,
) -> Choice:  # fmt: skip
    """The scheme of least divergence within ``avg_bits``, or of fewest bits within ``max_kl``.

    Args:
        planned: The plan in a scheme, its problems listed and not raised.
        choose_from: Formats to choose among, as ``formats_of`` reads them.
        ids: Calibration tokens [n, length]; the first `TOKENS` are used.
        avg_bits: Bits per weight of the block linears, scales counted.
        max_kl: Nats per token between the float model and the model rounded to nearest.
        compute: Dtype of the runs.
        report: Told of the progress.

    Raises:
        Refused: The plan has problems whatever the formats, or the budget cannot be met; the closest point that can be
            is named.
    """
    menu = menu_of(formats_of(choose_from), planned)
    ids = ids[: max(1, TOKENS // ids.shape[1])]
    trial = _trial(planned(_scheme(menu, [_lowest(place.options) for place in menu.places])).require())
    program = trial.steps[-1].program
    noise = NoiseSweep(program, menu.places, ids, compute, report, trial.device)
    Solver(trial, ids, _nowhere, compute=compute, report=report, watch=noise).run()
    costs = noise.costs()
    found = curve([place.bits for place in menu.places], costs)

    def measure(points: Sequence[int]) -> dict[int, float]:
        choices = [_schemes(menu, found.picks(point)) for point in points]
        sweep = TrialSweep(program, choices, ids, compute, report, trial.device)
        Solver(trial, ids, _nowhere, compute=compute, report=report, watch=sweep).run()
        return dict(zip(points, sweep.divergences, strict=True))

    if avg_bits is not None:
        asked = f"--avg-bits {avg_bits:g}"
        point = _within(menu, found, avg_bits)
        measured = measure(list(dict.fromkeys([point, *_spread(found)])))
    else:
        assert max_kl is not None
        asked = f"--max-kl {max_kl:g}"
        point, measured = _reaching(menu, found, max_kl, measure)
    return _choice(asked, menu, found, point, measured, costs)


def _within(menu: Menu, found: Curve, avg_bits: float) -> int:
    point = found.within(avg_bits * menu.weights - menu.fixed_bits)
    if point is None:
        least = menu.average(int(found.costs[0]))
        raise Refused(
            f"--avg-bits {avg_bits:g} cannot be reached: the fewest are {least:.2f} bits per weight, scales counted,"
            f" with {_counted(menu, found.picks(0))}. Ask for {least + 0.005:.2f}, or allow fewer with --choose-from"
        )
    return point


def _reaching(
    menu: Menu, found: Curve, max_kl: float, measure: Callable[[Sequence[int]], dict[int, float]]
) -> tuple[int, dict[int, float]]:
    """The point of fewest bits whose measured divergence is within ``max_kl``, and all that was measured."""
    measured: dict[int, float] = {}
    near = (found.reaching(max_kl * 2.0**k) for k in (1, 0, -1, -2))
    points = {0, len(found) - 1} | {point for point in near if point is not None}
    for _ in range(ROUNDS):
        if new := sorted(points - measured.keys()):
            measured |= measure(new)
        good = [p for p in sorted(measured) if measured[p] <= max_kl]
        bad = [p for p in sorted(measured) if measured[p] > max_kl and (not good or p < good[0])]
        if good and (not bad or good[0] - bad[-1] <= 1):
            break
        points = _between(found, bad[-1], good[0] if good else len(found) - 1)
    good = [p for p in sorted(measured) if measured[p] <= max_kl]
    if not good:
        best = min(measured, key=lambda p: measured[p])
        raise Refused(
            f"--max-kl {max_kl:g} cannot be reached: the closest is KL {measured[best]:.3g} nats per token at"
            f" {menu.average(int(found.costs[best])):.2f} bits per weight, with {_counted(menu, found.picks(best))}."
            f" Ask for more, or allow more bits with --choose-from"
        )
    return good[0], measured


def _between(found: Curve, low: int, high: int) -> set[int]:
    """Some points between two: all where they are few, else those in the middle and evenly over predicted errors."""
    if high - low - 1 <= POINTS:
        return set(range(low + 1, high))
    most = float(found.errors[low])
    least = max(float(found.errors[high]), most / 4096)
    wanted = (least * (most / least) ** (k / POINTS) for k in range(1, POINTS))
    return {(low + high) // 2} | {p for one in wanted if (p := found.reaching(one)) is not None}


def _spread(found: Curve) -> list[int]:
    """Points that lie evenly over the bits of the curve."""
    low, high = int(found.costs[0]), int(found.costs[-1])
    steps = (low + (high - low) * k / (POINTS - 1) for k in range(POINTS))
    return [point for step in steps if (point := found.within(step)) is not None]


def _choice(
    asked: str,
    menu: Menu,
    found: Curve,
    point: int,
    measured: dict[int, float],
    costs: Sequence[Sequence[float]],
) -> Choice:
    picks = found.picks(point)
    shown = sorted({*measured, *_spread(found), point})
    points = {
        p: Point(menu.average(int(found.costs[p])), float(found.errors[p]), measured.get(p)) for p in shown
    }
    rows = [
        (str(place), place.options[pick].spelling, costs[i][pick])
        for i, (place, pick) in enumerate(zip(menu.places, picks, strict=True))
    ]
    return Choice(
        asked, _scheme(menu, picks), points[point], tuple(points.values()), tuple(_counts(menu, picks).items()),
        tuple(sorted(rows, key=lambda row: (-row[2], row[0]))),
    )  # fmt: skip


def _counts(menu: Menu, picks: Iterable[int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for place, pick in zip(menu.places, picks, strict=True):
        name = str(place.options[pick]) if place.options[pick].quantized else "float"
        counts[name] = counts.get(name, 0) + len(place.linears)
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _counted(menu: Menu, picks: Iterable[int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in _counts(menu, picks).items())


def _lowest(options: Sequence[Any]) -> int:
    """The integer format of fewest bits, else float."""
    return next((i for i, one in enumerate(options) if one.quantized), 0)


def _schemes(menu: Menu, picks: Sequence[int]) -> dict[str, Any]:
    return {
        name: place.options[pick]
        for place, pick in zip(menu.places, picks, strict=True)
        for name in place.linears
    }


def _scheme(menu: Menu, picks: Sequence[int]) -> Scheme:
    """The rules of a choice: one per format, with globs that match its linears alone."""
    chosen = _schemes(menu, picks)
    groups: dict[Any, list[str]] = {}
    for name, one in chosen.items():
        groups.setdefault(one, []).append(name)
    rules = [
        Rule(include=tuple(globs(names, chosen)), scheme=one) for one, names in groups.items() if one != FLOAT
    ]
    return Scheme("chosen", tuple(rules))


def _trial(plan: Plan) -> Plan:
    """The passes of a plan that work on float weights, and rounding to nearest behind them."""
    kept = []
    for step in plan.steps:
        edits = [edit for rewrite in step.answer.rewrites for edit in rewrite.edits]
        beside = any(e.verb in BESIDE_INTEGERS or isinstance(e.operand, Stub) for e in edits)
        if not beside and Fact.QUANTIZED not in step.what.provides:
            kept.append(step.what)
    rounding: Any = registry.get("passes", "linear_quant")
    return make_plan(
        plan.program, [*kept, rounding()], scheme=plan.scheme, target="modelslim", tp=plan.tp, seed=plan.seed,
        run=plan.run,
    ).require()  # fmt: skip


def _nowhere(name: str, tensor: Tensor) -> None:
    """A trial writes nothing."""
