"""Losses: how a training went, step by step, for the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..compiler.view import BlockView

POINTS = 100
"""Points that a curve keeps: a longer one is drawn through means of equal stretches."""


@dataclass
class Losses:
    """Relative errors of a block's output while something in it is trained."""

    held_out: list[tuple[int, float]] = field(default_factory=list)
    """Mean loss on the held-out microbatches after so many steps, the untrained state first."""
    training: list[float] = field(default_factory=list)
    """Loss of every step on its own microbatch, before the step is taken."""

    @property
    def start(self) -> float:
        """The held-out loss before training."""
        return self.held_out[0][1]

    @property
    def best(self) -> float:
        """The least held-out loss, that of the state which is kept."""
        return min(loss for _, loss in self.held_out)

    def tell(self, view: BlockView) -> None:
        """Let the journal know."""
        view.measures |= {"loss before training": self.start, "loss after training": self.best}
        view.curves |= {"held-out loss": self.held_out, "training loss": thinned(self.training)}


def thinned(values: Sequence[float]) -> list[tuple[int, float]]:
    """A value per step as at most ``POINTS`` pairs of a step and a value."""
    size = -(-len(values) // POINTS) or 1
    starts = range(0, len(values), size)
    return [(first, sum(part) / len(part)) for first in starts if (part := values[first : first + size])]
