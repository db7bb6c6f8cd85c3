"""The gated product of an MLP."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.pattern import Site, pattern
from ..compiler.sketch import SCALE, Sketch


@dataclass(frozen=True)
class UpDown:
    """``down(gate * up(x))``: linear in ``up``, so a scale moves from ``down``'s columns to ``up``'s rows."""

    up: Site
    gate: str
    down: Site
    gate_writers: tuple[Site, ...]
    """The linears from which the gate is computed (a packed gate_up linear is ``up``'s module again)."""


@pattern
def up_down(p: Sketch) -> UpDown:
    """A linear that nothing but a product reads, times a gate, read by one linear and by nothing else."""
    up, gate = p.linear(), p.value()
    product = p.mul(up, gate)  # commutative by law, no second rule
    p.only_reader(up, product)  # h * sigmoid(h) is not this
    down = p.linear(product, through=SCALE)  # across whatever the laws let a scale pass
    p.only_reader(product, down)
    return UpDown(up=up, gate=gate, down=down, gate_writers=p.feeding(gate))  # type: ignore[arg-type]
