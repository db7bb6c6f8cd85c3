"""Preconditioner: steps that go less far where the inputs of a linear are strong."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.5
"""Added to the Hessian, as a share of the mean of its diagonal."""
SHARE = 8
"""One direction in so many is looked at, the strongest ones; the others count as their mean."""
LEAST = 64
ROUNDS = 3
"""How often the Hessian turns random directions towards the strongest."""


class Preconditioner:
    """``(H / mean diag(H) + DAMPING · I)⁻¹`` up to a factor, of the Hessian of a linear's inputs [in, in].

    What matters are the strong directions V, of strengths h. All others have the mean r of what is left:
    ``I - V diag((h - r) / (h + DAMPING)) Vᵀ``. A product with the whole inverse would cost as much as a forward pass of
    1024 tokens.

    Source: subspace iteration, Halko, Martinsson and Tropp (arXiv 0909.4061), algorithm 4.4.
    """

    def __init__(self, hessian: Tensor) -> None:
        mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        width = len(hessian)
        rank = min(width, max(LEAST, width // SHARE))
        basis = torch.randn(width, rank, generator=torch.Generator().manual_seed(0)).to(hessian.device)
        for _ in range(ROUNDS):
            basis, _ = torch.linalg.qr(hessian @ (basis / mean))
        strength, turn = torch.linalg.eigh(basis.T @ (hessian / mean) @ basis)
        strength = strength.clamp(min=0)
        rest = (width - strength.sum()).clamp(min=0) / max(width - rank, 1)  # the trace is the width
        self.basis = basis @ turn
        self.cut = (strength - rest) / (strength + DAMPING)

    def __call__(self, rows: Tensor) -> Tensor:
        """The rows of a gradient [out, in], turned into steps."""
        return torch.addmm(rows, (rows @ self.basis).mul_(self.cut), self.basis.T, alpha=-1)
