"""Narrow a config: an architecture's sizes and depth cut as far as its relations between sizes allow."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from transformers import PretrainedConfig

from .program import Program

NARROW = 32
"""Sizes are halved no further than this."""
FEWEST = 2
"""Counts are halved no further than this (two of a kind can still be mixed up), nor below an eighth."""
GRAIN = 16
"""Powers of two up to this stay divisors of a size that is halved."""
COUNT = 64
"""A size up to this is taken for a count (of heads, of experts) that has to divide what it divided before."""
FEW = 8
"""How many times, at least, a divisor goes into a size of the twin, if it went in so often before."""
WINDOW = 8
"""Windows of the twin, so that short inputs are longer than every window."""
VOCABULARY = 256
"""Rows of a narrow embedding."""


@dataclass(frozen=True)
class Shrunk:
    """A config of a twin and how it was made."""

    config: PretrainedConfig
    layers: int
    narrow: bool


def layers_of_every_kind(program: Program) -> int:
    """Length of the shortest prefix of blocks, at least two, with every kind and every way to feed one."""
    seen: dict[object, int] = {}
    for number, part in enumerate(program.blocks):
        fed = tuple(
            source.name
            for node in program.nodes(part)
            for source in node.all_input_nodes
            if source.meta["part"] == 0
        )
        seen.setdefault((part.kind, fed), number)
    return min(len(program.blocks), max(2, max(seen.values()) + 1))


def sizes_of(program: Program) -> set[int]:
    """Numbers that are sizes of tensors in the graph or of parameters."""
    found: set[int] = set()
    for node in program.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            found |= {size for size in val.shape if isinstance(size, int)}
    for leaf in program.leaves.values():
        found |= {size for shape in leaf.parameters.values() for size in shape}
    return found


def _literals(program: Program) -> set[int]:
    """Integers that the prologue computes with: windows and chunks of masks are among them."""
    prologue = program.parts[0]
    return {
        a
        for node in program.nodes(prologue)
        if node.op == "call_function" and not _layout(node)
        for a in node.args
        if type(a) is int
    }


def _layout(node: fx.Node) -> bool:
    words = ("unsqueeze", "view", "reshape", "slice", "transpose", "expand", "sym_size", "cat", "select")
    return any(word in str(node.target) for word in words)


def _holds(now: Mapping[str, int], was: Mapping[str, int], products: bool, counts: bool) -> bool:
    """Whether what was true of the sizes still is: order, divisors, even quotients, products if asked."""
    keys = list(was)
    for a in keys:
        grain = FEWEST if counts and was[a] <= COUNT else GRAIN
        if now[a] % math.gcd(was[a], grain):
            return False
        for b in keys:
            if was[a] == was[b] and now[a] != now[b]:
                return False
            if was[a] > was[b] and now[a] <= now[b]:
                return False
            if was[a] % was[b] == 0 and (products or was[b] <= COUNT) and _coarser(now, was, a, b):
                return False
    if products:
        for a in keys:
            for b in keys:
                for c in keys:
                    if was[a] == was[b] * was[c] and now[a] != now[b] * now[c]:
                        return False
    return True


def _coarser(now: Mapping[str, int], was: Mapping[str, int], a: str, b: str) -> bool:
    """Whether b does not divide a any more, or too few times: a head needs pairs of channels, and several."""
    before, after = was[a] // was[b], now[a] // now[b]
    return bool(now[a] % now[b]) or after < min(before, FEW) or (before % 2 == 0 and after % 2 == 1)


def _narrowed(was: Mapping[str, int], products: bool, counts: bool = False) -> dict[str, int]:
    """Sizes halved, largest first and one round after another, as long as their relations hold.

    ``counts``: what is taken for a count is halved too (64 heads for 8 keep a model of 128 channels a head wide).
    """
    now = dict(was)
    moved = True
    while moved:
        moved = False
        for key in sorted(now, key=lambda k: (-now[k], k)):
            fewest = max(FEWEST, was[key] // FEW) if counts and was[key] <= COUNT else NARROW
            if now[key] % 2 or now[key] // 2 < fewest:
                continue
            group = [k for k in now if was[k] == was[key]]
            tried = now | dict.fromkeys(group, now[key] // 2)
            if _holds(tried, was, products, counts):
                now, moved = tried, True
        if products and not moved:
            for left, right in _pairs(now, was):
                tried = now | {k: now[k] // 2 for k in (*left, *right)}
                if _holds(tried, was, products, counts):
                    now, moved = tried, True
                    break
    return now


def _pairs(now: Mapping[str, int], was: Mapping[str, int]) -> Iterator[tuple[list[str], list[str]]]:
    """Groups of equal sizes of which one is the product of the other and something: they shrink together."""
    for a in sorted(was):
        for b in sorted(was):
            if was[a] > was[b] > 1 and was[a] % was[b] == 0:
                left = [k for k in was if was[k] == was[a]]
                right = [k for k in was if was[k] == was[b]]
                if all(now[k] % 2 == 0 and now[k] // 2 >= NARROW // 4 for k in (*left, *right)):
                    yield left, right


def shrunk_configs(program: Program) -> Iterator[Shrunk]:
    """Configs to try for a twin, narrowest first; the last is cut in depth and vocabulary alone."""
    config = program.config
    layers, count = layers_of_every_kind(program), len(program.blocks)
    sizes, literals = sizes_of(program), _literals(program)
    values: dict[str, Any] = config.to_dict()
    numbers = {k: v for k, v in values.items() if type(v) is int and v > 1}
    depth = {k for k, v in numbers.items() if v == count and k not in _also_width(numbers, sizes, count)}
    windows = {
        k for k, v in numbers.items() if v in literals and v > WINDOW and v not in sizes and not _is_length(k)
    }
    windows |= {k for k, v in numbers.items() if v in literals and "window" in k}
    rows = {leaf.parameters["weight"][0] for leaf in program.leaves.values() if leaf.kind == "embedding"}
    tables = {k for k, v in numbers.items() if v in rows and v > VOCABULARY and "position" not in k}
    fixed = depth | windows | tables | {k for k in numbers if _is_length(k)}
    widths = {k: v for k, v in numbers.items() if v in sizes and k not in fixed}
    cut: dict[str, Any] = dict.fromkeys(depth, layers) | dict.fromkeys(windows, WINDOW)
    cut |= {k: v[:layers] for k, v in values.items() if isinstance(v, list) and len(v) == count}
    narrow: dict[str, Any] = dict.fromkeys(tables, VOCABULARY)
    narrow |= {k: 0 for k, v in values.items() if k.endswith("_token_id") and type(v) is int and v >= NARROW}
    for products, counts in ((False, True), (False, False), (True, False)):
        sizes_now = _narrowed(widths, products, counts)
        yield Shrunk(_rebuilt(config, values, cut | narrow | sizes_now), layers, True)
    yield Shrunk(_rebuilt(config, values, cut | narrow), layers, False)


def _is_length(key: str) -> bool:
    """Whether a key says how long inputs may be."""
    return any(word in key for word in ("position", "seq_len", "max_length", "n_ctx"))


def _also_width(numbers: Mapping[str, int], sizes: set[int], count: int) -> set[str]:
    """Keys whose number is that of the layers but whose names say otherwise (32 layers, 32 heads)."""
    if count not in sizes:
        return set()
    return {k for k, v in numbers.items() if v == count and "layer" not in k}


def _rebuilt(config: Any, values: Mapping[str, Any], changes: Mapping[str, Any]) -> PretrainedConfig:
    merged = copy.deepcopy({**values, **changes})
    return type(config).from_dict(merged)
