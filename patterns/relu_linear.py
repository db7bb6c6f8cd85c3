"""Two linears with a ReLU, or its square, in between."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.pattern import Site, pattern
from ..compiler.sketch import Sketch


@dataclass(frozen=True)
class ReluLinear:
    """``second(relu(first(x))ⁿ)``: a scale of ``first``'s rows comes out of the activation to the power ``degree``."""

    first: Site
    second: Site
    degree: int


@pattern
def relu_linear(p: Sketch) -> ReluLinear:
    """A linear that one linear reads through ReLU and whole powers alone, and nothing else."""
    first = p.linear()
    second = p.activated(first)
    p.only_reader(first, second)
    return ReluLinear(first=first, second=second, degree=second.degree)  # type: ignore[arg-type]
