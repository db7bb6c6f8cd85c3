"""Every linear."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.pattern import Site, pattern
from ..compiler.sketch import Sketch


@dataclass(frozen=True)
class Linear:
    """One linear, whole."""

    linear: Site


@pattern
def linear(p: Sketch) -> Linear:
    """Any linear."""
    return Linear(linear=p.whole_linear())  # type: ignore[arg-type]
