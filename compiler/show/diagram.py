"""Diagram: boxes, arrows and marks, made of the rows of a program and drawn by every format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "input", "output", "linear", "norm", "embedding", "attention", "op", "join", "inserted", "stub", "opaque",
    "alike", "run",
]  # fmt: skip
"""``join`` is a lone sum or product, ``inserted`` an online op that a pass put there (a Hadamard rotation, a division,
a low-rank branch), ``stub`` a place where q, k or v is put on a grid, ``run`` blocks that are alike, as one card."""


@dataclass(frozen=True)
class Chip:
    """A linear or an inserted op on the card of a run."""

    title: str
    kind: Kind
    format: str
    bits: int


@dataclass(frozen=True)
class Box:
    """One thing that is drawn: a leaf, an op, a few ops in a row that nothing else reads, a value from outside."""

    id: str
    """Name of the row that it ends in: ``v28``, ``in0``; ``out v36`` for what the part hands on."""
    kind: Kind
    title: str
    """``self_attn.o_proj``, ``attention``, ``silu ×``."""
    lines: tuple[str, ...] = ()
    """What else is written into it: sizes, facts of a norm."""
    format: str = ""
    """Of a linear whose numbers are not plain floats: ``W8A8``; empty for any other."""
    bits: int = 0
    """Bits of a linear's weight, 16 where it is float; 0 for what is no linear."""
    edits: tuple[str, ...] = ()
    """What passes did to its weights: ``iter_smooth scale_in``."""
    rows: tuple[str, ...] = ()
    """Its rows, as the canonical text has them."""
    chips: tuple[tuple[str, tuple[Chip, ...]], ...] = ()
    """Of a run: its linears, by the module that holds them."""


@dataclass(frozen=True)
class Arrow:
    """A value that one box computes and another reads."""

    source: str
    target: str
    type: str
    """``bf16[b, s, 576]``, as the reader gets it."""


@dataclass(frozen=True)
class Mark:
    """A match of a pattern, highlighted."""

    pattern: str
    """As it is registered: ``norm_linear``."""
    caption: str
    """``norm-linear``, and the passes that rewrote it."""
    boxes: tuple[str, ...]
    """Ids of the boxes that it names, in order."""
    arrows: tuple[int, ...]
    """Indices of the arrows on its way."""
    space: bool = False
    """Whether it is a whole space, drawn by its arrows and not by dots on all of its boxes."""


@dataclass(frozen=True)
class Diagram:
    """A part of a program, or all of it, as boxes and arrows. Two of the same program are equal."""

    title: str
    boxes: tuple[Box, ...]
    """In an order in which every box comes after those that it reads."""
    arrows: tuple[Arrow, ...]
    marks: tuple[Mark, ...] = ()
    dimmed: frozenset[str] = frozenset()
    """Ids of boxes that the reader did not ask for, drawn pale."""

    def box(self, id: str) -> Box:
        """The box of an id."""
        return next(box for box in self.boxes if box.id == id)
