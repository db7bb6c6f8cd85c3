"""Menu: the places of a model whose number formats can be chosen, and the formats that each may get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .cost import stored_bits
from .errors import Refused
from .operand import Quantize
from .plan import Plan
from .roles import mixtures
from .scheme import FLOAT, LinearScheme, Rule, Scheme
from .scheme_names import scheme_named
from .targets.served import LinearSite, facts_of, sites_of

DEFAULT = "w4a4,w4a8,w8a8,float"
"""What is chosen among where nobody says; a target takes what it serves."""


@dataclass(frozen=True)
class Place:
    """Linears that get one format together: a server runs them as one, or they are the experts of a layer."""

    linears: tuple[str, ...]
    part: int
    """Index of the part that they are in."""
    options: tuple[LinearScheme, ...]
    """Fewest bits first."""
    bits: tuple[int, ...]
    """Bits of all their weights in each, scales counted."""

    def __str__(self) -> str:
        first, *more = self.linears
        return (
            first + "".join(f"+{name.rpartition('.')[2]}" for name in more[:3]) + ("+..." if more[3:] else "")
        )


@dataclass(frozen=True)
class Menu:
    """All places, and the linears of the blocks that stay float whatever is chosen."""

    places: tuple[Place, ...]
    fixed_bits: int
    weights: int
    """Of all linears of the blocks."""

    def average(self, bits: float) -> float:
        """Bits per weight, given the bits of the places."""
        return (bits + self.fixed_bits) / max(self.weights, 1)


def formats_of(text: str) -> tuple[LinearScheme, ...]:
    """The formats that ``w4a4,w8a8,float`` spells.

    Raises:
        Refused: A scheme that nobody knows, one with several formats, or none at all.
    """
    found: dict[LinearScheme, None] = {}
    for name in filter(None, (word.strip() for word in text.split(","))):
        rules = scheme_named(name).rules
        if len(rules) > 1:
            raise Refused(
                f"--choose-from {name}: it is a mixture of formats itself; give uniform ones, such as w8a8"
            )
        found[rules[0].scheme if rules else FLOAT] = None
    if not found:
        raise Refused(f"--choose-from {text!r}: give formats, such as {DEFAULT}")
    return tuple(found)


def uniform(scheme: LinearScheme) -> Scheme:
    """One format for every linear."""
    return Scheme(scheme.spelling, (Rule(scheme=scheme),) if scheme.quantized else ())


def menu_of(formats: Iterable[LinearScheme], planned: Callable[[Scheme], Plan]) -> Menu:
    """The places of a model with the formats that passes and target allow there.

    Args:
        formats: What may be chosen.
        planned: The plan in a uniform scheme, its problems listed.

    Raises:
        Refused: Nothing can be quantized, or a place has no format at all; with the reasons.
    """
    allowed: dict[str, dict[LinearScheme, None]] = {}
    sites: dict[str, LinearSite] = {}
    mixed: dict[str, str] = {}
    quantizable: set[str] = set()
    why: list[str] = []
    for scheme in formats:
        plan = planned(uniform(scheme))
        taken = _taken(plan, scheme)
        found = sites_of(plan)
        sites = sites or {site.name: site for site in found}
        bad = [p for p in plan.target.check(found, facts_of(plan)) if p.severity == "error"]
        why += [str(problem) for problem in bad]
        where = {problem.site for problem in bad}
        quantizable |= taken if scheme.quantized else set()
        mixed |= _experts(plan)
        for site in found:
            hit = any(site.name == one or site.name.startswith(f"{one}.") for one in where)
            if not hit and (site.name in taken or not scheme.quantized):
                allowed.setdefault(site.name, {})[scheme] = None
    if not quantizable:
        raise Refused(f"no pass of this plan quantizes linears in any of these formats{_first(why)}")
    groups: dict[str, list[LinearSite]] = {}
    for site in sites.values():
        if site.name in quantizable:
            groups.setdefault(mixed.get(site.name) or min((site.name, *site.fused)), []).append(site)
    places = [_place(group, allowed, plan, why) for group in groups.values()]
    if not any(one.quantized for place in places for one in place.options):
        raise Refused(f"no linear can be quantized in any of these formats{_first(why)}")
    fixed = [site for site in sites.values() if site.name not in quantizable]
    return Menu(
        tuple(places),
        sum(16 * site.in_features * site.out_features for site in fixed),
        sum(site.in_features * site.out_features for site in sites.values()),
    )


def _place(
    group: Sequence[LinearSite], allowed: dict[str, dict[LinearScheme, None]], plan: Plan, why: list[str]
) -> Place:
    options = [
        one for one in allowed.get(group[0].name, ()) if all(one in allowed.get(s.name, ()) for s in group)
    ]
    if not options:
        raise Refused(f"{group[0].name} can have none of these formats{_first(why)}")
    cost = {one: sum(stored_bits(s.out_features, s.in_features, one) for s in group) for one in options}
    options.sort(key=lambda one: cost[one])
    part = next(n.meta["part"] for n in plan.program.graph.nodes if str(n.target) == group[0].name)
    return Place(tuple(s.name for s in group), part, tuple(options), tuple(cost[one] for one in options))


def _first(why: Sequence[str]) -> str:
    return f": {why[0]}" if why else ""


def _taken(plan: Plan, scheme: LinearScheme) -> set[str]:
    """The linears to which a plan gives a format."""
    edits = (edit for step in plan.steps for rewrite in step.answer.rewrites for edit in rewrite.edits)
    return {e.site.module for e in edits if isinstance(e.operand, Quantize) and e.operand.scheme == scheme}


def _experts(plan: Plan) -> dict[str, str]:
    """For each linear of an expert the name under which its layer's experts are one place."""
    found: dict[str, str] = {}
    for mixture in mixtures(plan.program):
        linears = [name for expert in mixture for name in expert]
        found |= dict.fromkeys(linears, f"experts of {min(linears, default='')}")
    return found
