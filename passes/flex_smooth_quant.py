"""Flexible smoothing: the powers of activation and weight are searched for at every place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..compiler.scheme import W8A8
from .scale_trial import GRID, Trial, best
from .smooth_formula import smooth_scale
from .smoothing import Smoothing, Subgraph


@dataclass(frozen=True, kw_only=True)
class FlexSmoothQuant(Smoothing):
    """Smooth with the powers that make the smallest error in int8, place by place.

    **Why.** How much of an outlier the weights can take differs from place to place; one alpha for a model is a
    compromise.

    **Before / after.** ``s = clamp(max|x|^alpha / max|W|^beta, 1e-5)``: first alpha on a grid of 0.05 with
    ``beta = 1 - alpha``, then beta with the best alpha, each judged by what the readers compute from sampled rows
    with weights in int8 per channel and activations in int8 per token.

    **Source.** The recipe's ``flex_smooth_quant``; SmoothQuant (arXiv 2211.10438) for the formula.
    """

    name = "flex_smooth_quant"
    summary = "move activation outliers into weights, by powers searched for at every place"
    needs = ("absmax", "rows")

    alpha: float | None = None
    """Power of the activation, between 0 and 1; None searches for it."""
    beta: float | None = None
    """Power of the weight, between 0 and 1; None searches for it."""
    enable_subgraph_type: tuple[str, ...] | None = None
    """Subgraph types to smooth; None takes those that are meaningful where the pass stands."""
    include: tuple[str, ...] = ("*",)
    """Globs of writer names (norm, v, up, first linear)."""
    exclude: tuple[str, ...] = ()
    """Globs of writer names to leave alone."""
    group_method: Literal["max", "mean"] = "max"
    """How the query heads of a group are joined: statistics by max, or scales by mean."""

    def __post_init__(self) -> None:
        for option in ("alpha", "beta"):
            power = getattr(self, option)
            if power is not None and not 0 <= power <= 1:
                raise ValueError(f"{option}={power}: it must be between 0 and 1")
        super().__post_init__()

    def scale(self, found: Subgraph) -> Tensor:
        """The scale of least error."""

        def powers(alpha: float, beta: float) -> Tensor:
            return smooth_scale(found, alpha, beta, group_method=self.group_method)

        trial = Trial(found, W8A8)
        alpha, beta = self.alpha, self.beta
        if alpha is None:
            alpha, *_ = best(trial, GRID, lambda a: powers(a, 1 - a if beta is None else beta))
        if beta is None:
            start = [1 - alpha] if self.alpha is None else []  # what the first stage found stays a candidate
            beta, *_ = best(trial, [*GRID, *start], lambda b: powers(alpha, b))
        return powers(alpha, beta)
