"""The linears of a compile by what they are for, layer by layer: columns that charts are drawn from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from ..plan import Plan

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""The index of an expert in what follows the name of a block."""
EXPERTS = "*"


def linear_columns(plan: Plan, entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per kind of linear (``mlp.down_proj``), in the order in which they occur; experts count as one.

    A column has a value per block, None where the block has no such linear or nothing was measured. Of experts it
    is the worst: the widest range, the largest kurtosis, the least ratio of signal to noise.

    ``format`` says the scheme of the linear, ``bits`` those of its weight (16 for float), ``experts`` how many linears
    a value stands for; then ``weight`` and ``input``, each with ``low``, ``high`` and ``kurtosis`` before and after,
    and ``sqnr`` and ``weight_sqnr`` in dB.
    """
    spread: dict[str, Mapping[str, Any]] = {}
    noise: dict[str, dict[str, float]] = {"sqnr_db": {}, "weight_sqnr_db": {}}
    for entry in entries:
        spread |= entry.get("spread", {})
        for key, of in noise.items():
            of |= entry.get(key, {})
    blocks = {part.index: number for number, part in enumerate(plan.final.blocks)}
    kinds: dict[str, list[list[str]]] = {}
    schemes: dict[str, Any] = {}
    for node in plan.final.graph.nodes:
        leaf = plan.final.leaf(node)
        if leaf is None or leaf.kind != "linear" or node.meta["part"] not in blocks:
            continue
        name, number = str(node.target), blocks[node.meta["part"]]
        schemes[name] = node.meta.get("scheme")
        kind = kind_of(name, plan.final.blocks[number].name)
        members = kinds.setdefault(kind, [[] for _ in blocks])[number]
        if name not in members:
            members.append(name)
    return [_row(kind, layers, schemes, spread, noise) for kind, layers in kinds.items()]


def kind_of(name: str, block: str) -> str:
    """What a linear is in its block, whichever block and whichever expert: ``mlp.experts.*.down_proj``."""
    return NUMBER.sub(EXPERTS, "." + name.removeprefix(f"{block}."))[1:]


def _row(
    kind: str, layers: Sequence[Sequence[str]], schemes: Mapping[str, Any], spread: Mapping[str, Any],
    noise: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:  # fmt: skip
    def column(values: Any, worst: Any) -> list[float | None]:
        found = [[value for name in names if (value := values(name)) is not None] for names in layers]
        return [worst(of) if of else None for of in found]

    def spreads(what: str, when: str, key: str) -> list[float | None]:
        return column(
            lambda name: spread.get(name, {}).get(when, {}).get(what, {}).get(key),
            min if key == "low" else max,
        )

    row: dict[str, Any] = {
        "kind": kind,
        "format": [_one(_format(schemes[name]) for name in names) for names in layers],
        "bits": column(lambda name: _bits(schemes[name]), max),
        "experts": max(map(len, layers)),
    }
    for what in ("weight", "input"):
        row[what] = {
            when: {key: spreads(what, when, key) for key in ("low", "high", "kurtosis")}
            for when in ("before", "after")
        }
    for key, of in noise.items():
        finite = {name: value for name, value in of.items() if isfinite(value)}
        row[key.removesuffix("_db")] = column(finite.get, min)
    return row


def _format(scheme: Any) -> str:
    return str(scheme) if scheme is not None and scheme.quantized else "float"


def _bits(scheme: Any) -> int:
    return 16 if scheme is None else scheme.bits


def _one(names: Iterable[str]) -> str | None:
    """The one name among names, several joined, None of none."""
    return ", ".join(dict.fromkeys(names)) or None
