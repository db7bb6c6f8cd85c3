"""Names of schemes: registered ones, and those with another granularity of their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import registry
from .scheme import Int, Scheme

PER_TENSOR, ASYMMETRIC = "-pt", "-asym"


def scheme_named(name: str) -> Scheme:
    """A registered scheme, or one with other weights: ``-gN`` groups of N channels, ``-pt`` one scale per tensor.

    ``-asym`` at the end gives the weights offsets.

    Raises:
        Refused: A name that is neither.
    """
    known = registry.names("schemes")
    if name in known:
        return registry.get("schemes", name)
    base = name.removesuffix(ASYMMETRIC)
    symmetric = base == name
    if not symmetric and base in known:
        return _with_weights(name, base, lambda weight: replace(weight, symmetric=False))
    plain, _, size = base.rpartition("-g")
    if plain in known and size.isdecimal() and int(size) >= 1:
        return _with_weights(
            name, plain, lambda w: Int(w.bits, "group", group=int(size), symmetric=symmetric)
        )
    plain = base.removesuffix(PER_TENSOR)
    if plain != base and plain in known:
        return _with_weights(name, plain, lambda w: Int(w.bits, "tensor", symmetric=symmetric))
    return registry.get("schemes", name)


def _with_weights(name: str, base: str, make: Callable[[Int], Int]) -> Scheme:
    scheme: Scheme = registry.get("schemes", base)
    rules = []
    for rule in scheme.rules:
        weight = rule.scheme.weight
        rules.append(replace(rule, scheme=replace(rule.scheme, weight=weight and make(weight))))
    return Scheme(name, tuple(rules))
