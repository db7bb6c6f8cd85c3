"""AWQ: channels that are active get a finer grid, by a scale that writer and readers absorb."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compiler.scheme import Rule
from .quantizers import quantizer_of, spelled_quantizer
from .scale_trial import Trial, best
from .smoothing import Smoothing, Subgraph

SMALLEST = 1e-4


@dataclass(frozen=True, kw_only=True)
class Awq(Smoothing):
    """Scale channels by a power of their mean activation, searched for with the weights quantized.

    **Why.** With weights of few bits and float activations, the error of a weight counts as much as its channel is
    active. Multiplying the columns of active channels makes their rounding relatively finer.

    **Before / after.** ``s = clamp(mean|x|^r, 1e-4)``, divided by ``sqrt(max s · min s)``, with r on a grid of
    ``1 / n_grid``, judged by what the readers compute from sampled rows with rounded weights. The second search of the
    paper, that of clip ratios, belongs to the quantizer: ``linear_quant{weight_method=clip}``.

    **Source.** AWQ (arXiv 2306.00978), section 3.2; the recipe's ``awq``.
    """

    name = "awq"
    summary = "scale channels by a power of their mean activation, so that active ones are rounded finely"
    needs = ("absmean", "rows")
    weight_methods = ("minmax", "ssz", "clip")

    weight_qconfig: str | Rule | None = None
    """Format of the weights and their method, such as ``w4a16-g64``; None takes what the plan gives the readers."""
    n_grid: int = 20
    """Powers that are tried: 0, 1/n, ..., (n - 1)/n."""
    enable_subgraph_type: tuple[str, ...] | None = None
    """Subgraph types to scale; None takes those that are meaningful where the pass stands."""
    include: tuple[str, ...] = ("*",)
    """Globs of writer names (norm, v, up, first linear)."""
    exclude: tuple[str, ...] = ()
    """Globs of writer names to leave alone."""

    def __post_init__(self) -> None:
        if self.n_grid < 1:
            raise ValueError(f"n_grid={self.n_grid}: it must be positive")
        spelled_quantizer(self.weight_qconfig, "weight_qconfig")
        super().__post_init__()

    def scale(self, found: Subgraph) -> Tensor:
        """The scale of least error."""
        act = found.joined(found.observed["absmean"], torch.mean)

        def power(r: float) -> Tensor:
            scale = (act**r).clamp(min=SMALLEST)
            return scale / (scale.max() * scale.min()).sqrt()

        chosen = quantizer_of(self.weight_qconfig, "weight_qconfig", found.planned)
        weights_only = replace(chosen.scheme, act=None)
        grid = (step / self.n_grid for step in range(self.n_grid))
        _, scale, _ = best(Trial(found, weights_only, chosen.weight_method), grid, power)
        return scale
