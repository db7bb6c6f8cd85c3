"""A rotation that is learned from the whole model before anything is solved."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .operand import Hadamard


@dataclass(eq=False)
class Turn:
    """An orthogonal matrix R [n, n] float64 that a survey finds; None, and the identity, before it has."""

    matrix: Tensor | None = None


@dataclass(frozen=True)
class Adapted(Hadamard):
    """The rotation Q R: a Hadamard matrix Q as described, then what a survey finds of R."""

    turn: Turn = field(default_factory=Turn)

    def __str__(self) -> str:
        return f"adapted {super().__str__()}"

    def times(self, x: Tensor) -> Tensor:
        """``x @ Q @ R`` for x of shape [..., width]."""
        y, matrix = super().times(x), self.turn.matrix
        return y if matrix is None else y @ matrix.to(y)

    def times_transposed(self, x: Tensor) -> Tensor:
        """``x @ (Q R)ᵀ`` for x of shape [..., width]."""
        matrix = self.turn.matrix
        return super().times_transposed(x if matrix is None else x @ matrix.to(x).T)
