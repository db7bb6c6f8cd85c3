"""SmoothQuant with an alpha that is learned at every norm, instead of one for all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qc.passes.smooth_formula import smooth_scale
from qc.passes.smooth_quant import SmoothQuant
from qc.passes.smoothing import Subgraph


def on_grid(x: Tensor, bits: int) -> Tensor:
    """Rows of x on their own grids; gradients pass the rounding, and reach the scale (LSQ, arXiv 1902.08153)."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / (2 ** (bits - 1) - 1)
    return scale * (x / scale + ((x / scale).round() - x / scale).detach())


@dataclass(frozen=True, kw_only=True)
class LearnedAlpha(SmoothQuant):
    """Descend on alpha until what the readers compute from quantized rows is closest to what they should.

    **Why.** One alpha for all norms is too much for some and too little for others.

    **Before / after.** As ``smooth_quant``, with the alpha of least error at every norm.

    **Source.** SmoothQuant (arXiv 2211.10438), with alpha trained as scales are in LSQ (arXiv 1902.08153).
    """

    name = "learned_alpha"
    summary = "move activation outliers into weights, with an alpha learned at every norm"
    needs = ("absmax", "rows")

    steps: int = 20
    """Steps of the descent; 0 is smooth_quant."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: it must be 0 or more")

    @torch.enable_grad()
    def scale(self, found: Subgraph) -> Tensor:
        """The scale of the alpha with the least error on sampled rows; alpha itself is where it starts."""
        rows, weight, planned = found.observed["rows"], torch.cat(found.weights), found.planned
        want, alpha = rows @ weight.T, torch.tensor(self.alpha, requires_grad=True)
        act, integer = (planned.scheme.act, planned.scheme.weight) if planned else (None, None)
        descent, tried = torch.optim.Adam([alpha], lr=0.05), list[tuple[float, Tensor]]()
        for _ in range(self.steps + 1):
            scale = smooth_scale(found, alpha, 1 - alpha)  # type: ignore[arg-type]
            x = on_grid(rows / scale, act.bits) if act else rows / scale
            w = on_grid(weight * scale, integer.bits) if integer else weight * scale
            loss = (x @ w.T - want).square().mean()
            tried.append((float(loss), scale.detach()))
            descent.zero_grad()
            loss.backward()
            descent.step()
            alpha.data.clamp_(0, 1)
        return min(tried, key=lambda one: one[0])[1]
