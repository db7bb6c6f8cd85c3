"""Menu: the places of a model whose number formats can be chosen, and the formats that each may get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .cost import linear_bits
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
    """Bits of all their weights in each, scales counted, and what stands in float beside integers."""

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
    allowed: dict[str, dict[LinearScheme, int]] = {}
    sites: dict[str, LinearSite] = {}
    mixed: dict[str, str] = {}
    quantizable: set[str] = set()
    why: dict[str, str] = {}
    for scheme in formats:
        plan = planned(uniform(scheme))
        taken = _taken(plan, scheme)
        found = sites_of(plan)
        sites = sites or {site.name: site for site in found}
        bad = _forbidden(plan)
        why = {**bad, **why}
        quantizable |= taken if scheme.quantized else set()
        mixed |= _experts(plan)
        for site in found:
            if not _hit(site.name, bad) and (site.name in taken or not scheme.quantized):
                allowed.setdefault(site.name, {})[scheme] = linear_bits(site, plan.dtype)
    if not quantizable:
        raise Refused(f"no pass of this plan quantizes linears in any of these formats{_reason(why)}")
    groups: dict[str, list[LinearSite]] = {}
    for site in sites.values():
        if site.name in quantizable:
            groups.setdefault(mixed.get(site.name) or min((site.name, *site.fused)), []).append(site)
    places = [_place(group, allowed, plan, why) for group in groups.values()]
    if not any(one.quantized for place in places for one in place.options):
        raise Refused(f"no linear can be quantized in any of these formats{_reason(why)}")
    fixed = [site for site in sites.values() if site.name not in quantizable]
    return Menu(
        tuple(places),
        sum(linear_bits(replace(site, scheme=FLOAT), plan.dtype) for site in fixed),
        sum(site.in_features * site.out_features for site in sites.values()),
    )


def _place(
    group: Sequence[LinearSite], allowed: Mapping[str, Mapping[LinearScheme, int]], plan: Plan,
    why: Mapping[str, str],
) -> Place:  # fmt: skip
    options = [
        one for one in allowed.get(group[0].name, ()) if all(one in allowed.get(s.name, ()) for s in group)
    ]
    if not options:
        own = {where: said for where, said in why.items() if any(_hit(s.name, {where: said}) for s in group)}
        raise Refused(f"{group[0].name} can have none of these formats{_reason(own or why)}")
    cost = {one: sum(allowed[s.name][one] for s in group) for one in options}
    options.sort(key=lambda one: cost[one])
    part = next(n.meta["part"] for n in plan.program.graph.nodes if str(n.target) == group[0].name)
    return Place(tuple(s.name for s in group), part, tuple(options), tuple(cost[one] for one in options))


def _forbidden(plan: Plan) -> dict[str, str]:
    """Linears, and modules with linears, that a pass or the target refuses in a plan, with the reason."""
    found: dict[str, str] = {}
    for step in plan.steps:
        for said in step.answer.problems:
            found.setdefault(said.partition(":")[0], f"{step.what.name}: {said}")
    for problem in plan.target.check(sites_of(plan), facts_of(plan)):
        if problem.severity == "error":
            found.setdefault(problem.site, str(problem))
    return found


def _hit(name: str, where: Iterable[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in where)


def _reason(why: Mapping[str, str]) -> str:
    return f": {next(iter(why.values()))}" if why else ""


def _taken(plan: Plan, scheme: LinearScheme) -> set[str]:
    """The linears to which a plan gives a format; a pass may keep single weights of them in float."""
    edits = (edit for step in plan.steps for rewrite in step.answer.rewrites for edit in rewrite.edits)
    operands = ((edit.site.module, edit.operand) for edit in edits)
    return {
        name
        for name, one in operands
        if isinstance(one, Quantize) and replace(one.scheme, outliers=scheme.outliers) == scheme
    }


def _experts(plan: Plan) -> dict[str, str]:
    """For each linear of an expert the name under which its layer's experts are one place."""
    found: dict[str, str] = {}
    for mixture in mixtures(plan.program):
        linears = [name for expert in mixture for name in expert]
        found |= dict.fromkeys(linears, f"experts of {min(linears, default='')}")
    return found
