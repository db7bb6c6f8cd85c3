"""What recipes say of int8 caches and attentions: a ``qconfig`` with one side, ``details`` for q, k and v."""

from __future__ import annotations

from typing import Any

from .qconfig import FIELDS, Reading, mapping
from .yaml_text import Entry

GRIDS = ("dynamic_cache", "fa3_quant")
NAMES = ("fa_q", "fa_k", "fa_v")


def grid_options(name: str, key: str, entry: Entry, reading: Reading) -> dict[str, Any]:
    """Options of ``dynamic_cache`` or ``fa3_quant`` for its ``qconfig`` or ``details``; faults go to ``reading``."""
    if name == "dynamic_cache":
        found = _side(entry, "the qconfig of dynamic_cache", ("per_channel",), reading)
        return {} if found is None else {"symmetric": found["symmetric"]}
    if key == "qconfig":
        scope = _scope(entry, "the qconfig of fa3_quant", reading)
        return {} if scope is None else dict.fromkeys(NAMES, scope)
    details = mapping(entry, NAMES, "details", reading) or {}
    scopes = {operand: _scope(one, f"details of {operand}", reading) for operand, one in details.items()}
    return {operand: scopes.get(operand) or "float" for operand in NAMES} if details else {}


def _scope(entry: Entry, what: str, reading: Reading) -> str | None:
    found = _side(entry, what, ("per_head", "per_token"), reading)
    if found is None:
        return None
    if found["symmetric"] is not True:
        reading.fault(entry.line, f"{what}: symmetric is true, a quantized attention has no offsets")
    return found["scope"]


def _side(entry: Entry, what: str, scopes: tuple[str, ...], reading: Reading) -> dict[str, Any] | None:
    """``{dtype: int8, scope, symmetric, method: minmax}``; None when something is wrong with it."""
    before = reading.count
    found = mapping(entry, FIELDS, what, reading)
    if found is None:
        return None
    values = {key: one.value for key, one in found.items()}
    for key, known in (("dtype", ("int8",)), ("scope", scopes), ("method", ("minmax",))):
        if key in values and values[key] not in known:
            reading.fault(
                found[key].line,
                f"{what}: {key} {values[key]} is not supported: there is {' or '.join(known)}",
            )
    if "symmetric" in values and not isinstance(values["symmetric"], bool):
        reading.fault(found["symmetric"].line, f"{what}: symmetric is true or false")
    if reading.count > before:
        return None
    return {"scope": scopes[0], "symmetric": True, **values}
