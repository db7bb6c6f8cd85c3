"""The residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.flow import Space
from ..compiler.pattern import pattern
from ..compiler.sketch import CENTRED, ROTATION, Sketch


@dataclass(frozen=True)
class Residual:
    """Everything that writes to or reads from the hidden state, closed under the laws of a rotation."""

    space: Space


@pattern
def residual(p: Sketch) -> Residual:
    """What an embedding writes, closed: all writers and readers of channels that are rotated together."""
    embedding = p.embedding()
    return Residual(space=p.space(embedding, ROTATION))  # type: ignore[arg-type]


@pattern
def residual_centred(p: Sketch) -> Residual:
    """The same where norms subtract the mean: closed under rotations that keep the all-ones vector."""
    embedding = p.embedding()
    return Residual(space=p.space(embedding, CENTRED))  # type: ignore[arg-type]
