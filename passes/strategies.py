"""Strategies: formats that a quantizing pass gives to linears by their names, instead of the plan's scheme."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..compiler import registry
from ..compiler.scheme import FLOAT, Rule, Scheme


def own_scheme(strategies: Iterable[str | Rule]) -> Scheme:
    """The rules that ``SCHEME:GLOB|GLOB`` items (no globs: every linear) and ready rules spell, in their order.

    A linear that no item matches stays float, as in the recipe's ``strategies``.

    Raises:
        Refused: A scheme that is not registered.
    """
    rules: list[Rule] = []
    for item in strategies:
        if isinstance(item, Rule):
            rules.append(item)
            continue
        name, _, globs = item.partition(":")
        include = tuple(glob.strip() for glob in globs.split("|") if glob.strip()) or ("*",)
        scheme: Scheme = registry.get("schemes", name.strip())
        rules += [replace(rule, include=include) for rule in scheme.rules or (Rule(scheme=FLOAT),)]
    return Scheme("strategies", tuple(rules))
