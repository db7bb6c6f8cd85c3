"""Names of schemes: registered ones, and those with another granularity of their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import registry
from .scheme import Int, Scheme

PER_TENSOR = "-pt"


def scheme_named(name: str) -> Scheme:
    """A registered scheme; ``NAME-gN`` gives its weights groups of N channels, ``NAME-pt`` one scale per tensor.

    Raises:
        Refused: A name that is neither.
    """
    known = registry.names("schemes")
    if name in known:
        return registry.get("schemes", name)
    base, _, size = name.rpartition("-g")
    if base in known and size.isdecimal() and int(size) >= 1:
        return _with_weights(name, base, lambda bits: Int(bits, "group", group=int(size)))
    base = name.removesuffix(PER_TENSOR)
    if base != name and base in known:
        return _with_weights(name, base, lambda bits: Int(bits, "tensor"))
    return registry.get("schemes", name)


def _with_weights(name: str, base: str, make: Callable[[int], Int]) -> Scheme:
    scheme: Scheme = registry.get("schemes", base)
    rules = []
    for rule in scheme.rules:
        weight = rule.scheme.weight
        rules.append(replace(rule, scheme=replace(rule.scheme, weight=weight and make(weight.bits))))
    return Scheme(name, tuple(rules))
