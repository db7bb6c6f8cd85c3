"""Flexible AWQ: the power of the activation is searched for with the quantizers that will be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..compiler.scheme import Rule
from .quantizers import Quantizer, quantizer_of, spelled_quantizer
from .scale_trial import GRID, Trial, best
from .smoothing import Smoothing, Subgraph

SMALLEST = 1e-5


@dataclass(frozen=True, kw_only=True)
class FlexAwqSsz(Smoothing):
    """Scale channels by a power of their mean activation, searched for with the real quantizer.

    **Why.** In 4 bits what matters is how the weights are rounded: channels that are active should be rounded finely.
    The best power depends on the quantizer, so the quantizer itself is asked.

    **Before / after.** ``s = clamp(mean|x|^alpha, 1e-5)``, alpha on a grid of 0.05, judged by what the readers compute
    from sampled rows with the weights and activations of ``qconfig`` (SSZ scales in recipes).

    **Source.** AWQ (arXiv 2306.00978) for the formula; the recipe's ``flex_awq_ssz``, which searches with the maximum
    of |x| and applies the mean: here it is the mean in both.
    """

    name = "flex_awq_ssz"
    summary = "scale channels by a power of their mean activation, searched for with the real quantizers"
    needs = ("absmean", "rows")
    weight_methods = ("minmax", "ssz", "clip")
    act_methods = ("minmax", "histogram")

    alpha: float | None = None
    """Power of the activation, between 0 and 1; None searches for it."""
    beta: float | None = None
    """Accepted and not used, as in the reference: the power of the weight is 0."""
    qconfig: str | Rule | None = None
    """Formats and weight method, such as ``w4a16-g64@ssz``; None takes those that the plan gives the readers."""
    enable_subgraph_type: tuple[str, ...] | None = None
    """Subgraph types to smooth; None takes those that are meaningful where the pass stands."""
    include: tuple[str, ...] = ("*",)
    """Globs of writer names (norm, v, up, first linear)."""
    exclude: tuple[str, ...] = ()
    """Globs of writer names to leave alone."""
    group_method: Literal["max", "mean"] = "max"
    """How the query heads of a group are joined: statistics by max, or scales by mean."""

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: it must be between 0 and 1")
        spelled_quantizer(self.qconfig, "qconfig")
        super().__post_init__()

    def scale(self, found: Subgraph) -> Tensor:
        """The scale of least error."""
        act = found.observed["absmean"]
        if self.group_method == "max":
            act = found.joined(act, torch.amax)

        def power(alpha: float) -> Tensor:
            scale = torch.where(act > 0, (act**alpha).clamp(min=SMALLEST), 1.0)
            return found.joined(scale, torch.mean) if self.group_method == "mean" else scale

        if self.alpha is not None:
            return power(self.alpha)
        chosen: Quantizer = quantizer_of(self.qconfig, "qconfig", found.planned)
        _, scale, _ = best(Trial(found, chosen.scheme, chosen.weight_method), GRID, power)
        return scale
