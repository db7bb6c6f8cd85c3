"""Two linears with anything in between that a positive scale passes."""

from __future__ import annotations

from dataclasses import dataclass

import qc
from qc.compiler.pattern import Site
from qc.compiler.sketch import SCALE, Sketch


@dataclass(frozen=True)
class Across:
    """A scale moves from ``second``'s columns to ``first``'s rows."""

    first: Site
    second: Site


@qc.pattern
def across(p: Sketch) -> Across:
    """A linear that one linear reads across what a scale passes, and nothing else."""
    first = p.linear()
    second = p.linear(first, through=SCALE)
    p.only_reader(first, second)
    return Across(first=first, second=second)  # type: ignore[arg-type]
