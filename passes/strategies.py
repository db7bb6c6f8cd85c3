"""Strategies: formats that a quantizing pass gives to linears by their names, instead of the plan's scheme."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..compiler import registry
from ..compiler.contract import Pass, Setting
from ..compiler.errors import Refused
from ..compiler.globs import unused_rules
from ..compiler.program import Program
from ..compiler.scheme import FLOAT, Rule, Scheme
from ..compiler.scheme_names import scheme_named

WEIGHT_METHODS, ACT_METHODS = ("minmax", "ssz", "clip"), ("histogram",)
"""Methods that may stand behind an ``@``."""


def own_scheme(strategies: Iterable[str | Rule]) -> Scheme:
    """The rules that ``SCHEME:GLOB|!GLOB`` items (no globs: every linear) and ready rules spell, in their order.

    ``SCHEME@METHOD``, such as ``w4a16@ssz`` or ``w8a8-static@histogram``, says how scales are found.
    A glob after ``!`` excludes. Schemes are spelled as ``--scheme`` takes them (``scheme_named``). A linear that no
    item matches stays float, as in the recipe's ``strategies``.

    Raises:
        Refused: A scheme that is not registered.
    """
    rules: list[Rule] = []
    for item in strategies:
        if isinstance(item, Rule):
            rules.append(item)
            continue
        name, _, text = item.partition(":")
        globs = [glob.strip() for glob in text.split("|") if glob.strip()]
        include = tuple(glob for glob in globs if not glob.startswith("!")) or ("*",)
        exclude = tuple(glob[1:] for glob in globs if glob.startswith("!"))
        name, *methods = (word.strip() for word in name.split("@"))
        rules += [
            replace(rule, include=include, exclude=exclude, **found_by(methods))
            for rule in scheme_named(name).rules or (Rule(scheme=FLOAT),)
        ]
    return Scheme("strategies", tuple(rules))


def check_methods(strategies: Iterable[str | Rule], one: Pass) -> None:
    """Refuse methods that a pass does not compute, and ranges where nothing has a fixed one.

    Raises:
        Refused: A scheme or a method that nobody knows.
        ValueError: A method that this pass, or this scheme, has no use for.
    """
    for rule in own_scheme(strategies).rules:
        for method, known in ((rule.weight_method, one.weight_methods), (rule.act_method, one.act_methods)):
            if method is not None and method not in known:
                raise ValueError(
                    f"strategies={rule}: {one.name} finds scales by {', '.join(known)}, not by {method}"
                )
        if rule.act_method == "histogram" and not rule.scheme.ranged:
            raise ValueError(
                f"strategies={rule}: {rule.scheme} has no fixed range that a histogram could find"
            )


def found_by(methods: Iterable[str]) -> dict[str, Any]:
    """Fields of a rule for ``@METHOD`` words; Refused for one that nobody knows."""
    found: dict[str, Any] = {}
    for method in methods:
        if method not in {*WEIGHT_METHODS, *ACT_METHODS}:
            raise Refused(registry.unknown("method", method, [*WEIGHT_METHODS, *ACT_METHODS]))
        found["act_method" if method in ACT_METHODS else "weight_method"] = method
    return found


def setting_of(
    strategies: tuple[str | Rule, ...], program: Program, setting: Setting
) -> tuple[Setting, tuple[str, ...]]:
    """The setting with the formats of a pass's own strategies, if it has any, and their globs that match nothing."""
    if not strategies:
        return setting, ()
    scheme = own_scheme(strategies)
    return replace(setting, scheme=scheme), tuple(unused_rules(scheme, program))
