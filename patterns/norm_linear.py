"""A norm and all the linears that read it."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.pattern import Site, pattern
from ..compiler.sketch import Sketch


@dataclass(frozen=True)
class NormLinear:
    """``readers(norm(x))``: the norm's gain can take a scale that the readers give back."""

    norm: Site
    readers: tuple[Site, ...]


@pattern
def norm_linear(p: Sketch) -> NormLinear:
    """A norm that nothing but linears reads."""
    norm = p.norm()
    readers = p.readers(norm)
    return NormLinear(norm=norm, readers=readers)  # type: ignore[arg-type]
