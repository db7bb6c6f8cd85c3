"""Clip search of activations: the share of a token's range that its integers should span."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

RATIOS = tuple(ratio / 20 for ratio in range(20, 9, -1))
"""1.0 down to 0.5; the server takes any ratio in (0, 1]."""


class ClipSearch:
    """Sum, over batches of rows, of the output error that each clip ratio makes; ``best`` is the ratio of least error.

    After a rotation a token's channels are nearly Gaussian, and the largest of many lies far out: cutting it
    buys a finer step for all others (OCS, arXiv 1901.09504; ACIQ, arXiv 1810.05723).
    """

    def __init__(self, weights: Iterable[Tensor], fake: Callable[[Tensor, float], Tensor]) -> None:
        self.weights = [weight.float() for weight in weights]
        """[out, in] of every linear that reads the value."""
        self.fake = fake
        """x [rows, in] and a ratio to x on its grid."""
        self.errors = torch.zeros(len(RATIOS), dtype=torch.float64)

    @torch.no_grad()
    def add(self, x: Tensor, importance: Tensor) -> None:
        """Take in rows [rows, in] with one weight each [rows]."""
        x = x.float()
        for at, ratio in enumerate(RATIOS):
            error = self.fake(x, ratio) - x
            for weight in self.weights:
                self.errors[at] += float(((error @ weight.T).square().sum(-1) * importance).sum())

    @property
    def best(self) -> float:
        """The ratio of least error; the widest of equals."""
        return RATIOS[int(self.errors.argmin())]
