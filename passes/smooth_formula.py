"""The scale of SmoothQuant: activations to a power over weights to another."""

from __future__ import annotations

import torch
from torch import Tensor

from .smoothing import Subgraph

SMALLEST_WEIGHT = 1e-5


def smooth_scale(
    found: Subgraph, alpha: float, beta: float, scale_min: float = 1e-5, group_method: str = "max"
) -> Tensor:
    """``s = clamp(max|x|^alpha / max|W|^beta, scale_min)`` per channel of the writer; 1 where nothing was active.

    Query heads that share a key head are joined by the maximum of their statistics, or the mean of their scales.

    Source: SmoothQuant (arXiv 2211.10438), eq. 4, with ``beta = 1 - alpha``.
    """
    act = found.observed["absmax"]
    weight = torch.stack([weight.abs().amax(0) for weight in found.weights]).amax(0)
    if group_method == "max":
        act, weight = found.joined(act, torch.amax), found.joined(weight, torch.amax)
    scale = act**alpha / weight.clamp(min=SMALLEST_WEIGHT) ** beta
    scale = torch.where(act > 0, scale.clamp(min=scale_min), 1.0)
    return found.joined(scale, torch.mean) if group_method == "mean" else scale
