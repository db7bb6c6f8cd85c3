"""Two linears in a row."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.pattern import Site, pattern
from ..compiler.sketch import Sketch


@dataclass(frozen=True)
class LinearLinear:
    """``second(first(x))`` with nothing but casts, copies and views in between."""

    first: Site
    second: Site


@pattern
def linear_linear(p: Sketch) -> LinearLinear:
    """A linear that one linear reads as it is, and nothing else."""
    first = p.linear()
    second = p.linear(first)
    p.only_reader(first, second)
    return LinearLinear(first=first, second=second)  # type: ignore[arg-type]
