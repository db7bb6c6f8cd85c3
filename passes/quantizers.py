"""The quantizer for which a scale is searched: spelled by the user, or the one that the plan has for the readers."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.errors import Refused
from ..compiler.operand import Quantize
from ..compiler.scheme import W8A8, LinearScheme, Rule
from .strategies import own_scheme


@dataclass(frozen=True)
class Quantizer:
    """Formats of a linear, and how the scales of its weight are found."""

    scheme: LinearScheme
    weight_method: str = "minmax"


def spelled_quantizer(option: str | Rule | None, name: str) -> Quantizer | None:
    """The quantizer that an option spells, as ``SCHEME@METHOD``; None for none; ValueError for what is none."""
    if option is None:
        return None
    try:
        rules = own_scheme((option,)).rules
    except Refused as error:
        raise ValueError(f"{name}={option}: {error}") from None
    if len(rules) != 1 or not rules[0].scheme.quantized:
        raise ValueError(f"{name}={option}: give a scheme with one format for all linears, such as w4a16-g64")
    return Quantizer(rules[0].scheme, rules[0].weight_method or "minmax")


def quantizer_of(option: str | Rule | None, name: str, planned: Quantize | None) -> Quantizer:
    """The quantizer that an option spells, else that of the plan; W8A8 where the plan has none."""
    spelled = spelled_quantizer(option, name)
    if spelled is not None:
        return spelled
    if planned is not None:
        known = planned.weight_method if planned.weight_method in ("minmax", "ssz", "clip") else "minmax"
        return Quantizer(planned.scheme, known)
    return Quantizer(W8A8)
