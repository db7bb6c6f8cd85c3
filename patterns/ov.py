"""The value and output projections of an attention."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.pattern import Site, pattern
from ..compiler.sketch import HEAD, SCALE, Map, Sketch


@dataclass(frozen=True)
class OV:
    """``o(attention(q, k, v))``: attention is linear in its values, head by head.

    ``v.channels`` are ordered by (kv head, channel of the head), ``o.channels`` by (query head, channel).
    Query head h reads value head ``h // (heads // kv_heads)``.
    """

    v: Site
    o: Site
    heads: int
    kv_heads: int
    head_dim: int


def draw(p: Sketch, through: Map) -> OV:
    """A linear whose output is the values of one attention, which one linear reads, and nothing else."""
    v = p.linear()
    attention = p.attention(v=v)
    p.only_reader(v, attention)
    o = p.linear(attention, through=through)
    p.only_reader(attention, o)
    return OV(
        v=p.channels(v, attention), o=o,
        heads=attention.heads, kv_heads=attention.kv_heads, head_dim=attention.head_dim,
    )  # type: ignore[arg-type]  # fmt: skip


@pattern
def ov(p: Sketch) -> OV:
    """v and o of one attention, such that a scale per channel moves from o's columns to v's rows."""
    return draw(p, SCALE)


@pattern
def ov_heads(p: Sketch) -> OV:
    """v and o of one attention, such that a matrix per head moves (a gate per channel in between forbids it)."""
    return draw(p, HEAD)
