"""SmoothQuant as its paper has it: norms and the linears that read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..patterns.norm_linear import norm_linear
from .smooth_formula import smooth_scale
from .smoothing import Smoothing, Subgraph


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Smoothing):
    """Move activation outliers into weights where a norm can absorb the scale.

    **Why.** The inputs of q, k, v and of gate, up have the largest outlier channels, and the norm before them takes
    any scale for nothing. ``iter_smooth`` does this and more; here is what other tools compare with.

    **Before / after.** ``s = max|x|^alpha / max|W|^(1 - alpha)`` per channel; the norm's gain is divided by s, the
    columns of its readers are multiplied.

    **Source.** SmoothQuant (arXiv 2211.10438), eq. 4; the recipe's ``smooth_quant``.
    """

    name = "smooth_quant"
    summary = "move activation outliers into weights through norms alone"
    patterns = (norm_linear,)
    before = {}
    subtypes = ("norm-linear",)

    alpha: float = 0.5
    """Migration strength, between 0 (weights decide) and 1 (activations decide)."""
    symmetric: bool = True
    """False also subtracts the middle of each channel's range (the norm gets a bias)."""
    include: tuple[str, ...] = ("*",)
    """Globs of norms."""
    exclude: tuple[str, ...] = ()
    """Globs of norms to leave alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: it must be between 0 and 1")
        super().__post_init__()

    def shifts(self, type_name: str) -> bool:
        """A norm can subtract what its readers add."""
        return not self.symmetric

    def scale(self, found: Subgraph) -> Tensor:
        """The formula."""
        return smooth_scale(found, self.alpha, 1 - self.alpha)
