"""Gram: the sum of Xᵀ X over batches of rows, of which half is computed."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Columns that are multiplied at once: few, so that little lies below the diagonal, and many enough for the speed of
matrix products."""


class Gram:
    """``Xᵀ X`` [width, width] float32 of rows that come in batches; ``count`` is how many there were."""

    def __init__(self) -> None:
        self.upper: Tensor | None = None
        self.count = 0

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take in rows [n, width], float32."""
        width = rows.shape[1]
        if self.upper is None:
            self.upper = rows.new_zeros(width, width)
        for start in range(0, width, BLOCK):
            stop = start + BLOCK
            self.upper[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """``Xᵀ X / n``, whole; zero where there were no rows."""
        assert self.upper is not None
        upper = self.upper.triu_()
        return (upper + upper.triu(1).T).div_(max(self.count, 1))
