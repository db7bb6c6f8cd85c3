"""Trials of a smoothing scale: what the readers of a place compute from sampled rows once all is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..compiler.scheme import Int, LinearScheme
from ..runtime.quantize import dequantize, fake_quant_per_token, quantize
from .act_range import act_scale
from .smoothing import Subgraph
from .weight_scale import weight_grid

STEPS = 20
"""Steps of a grid over [0, 1]."""
GRID = tuple(step / STEPS for step in range(STEPS + 1))


class Trial:
    """The readers of a place with their inputs and weights on the grids of a scheme.

    Args:
        found: The place; ``rows`` must have been observed.
        scheme: Formats of weights and activations.
        weight_method: How scales of weights are found: ``minmax``, ``ssz`` or ``clip``.
    """

    def __init__(self, found: Subgraph, scheme: LinearScheme, weight_method: str = "minmax") -> None:
        self.found, self.scheme, self.method = found, scheme, weight_method
        self.rows = found.observed["rows"].float()
        self.weight = torch.cat(found.weights).float()
        self.want = self.rows @ self.weight.T
        self.size = float(torch.linalg.vector_norm(self.want)) or 1.0

    @torch.no_grad()
    def error(self, scale: Tensor) -> float:
        """Relative error of what the readers compute, with the writer's channels divided by ``scale``."""
        spread = self.found.in_readers(scale)
        got = self._act(self.rows / spread) @ self._weight(self.weight * spread).T
        return float(torch.linalg.vector_norm(got - self.want)) / self.size

    def _act(self, x: Tensor) -> Tensor:
        act = self.scheme.act
        if act is None:
            return x
        if act.per == "token":
            return fake_quant_per_token(x, act.bits)
        scale, offset = act_scale(x.min()[None], x.max()[None], act, torch.float32)
        return dequantize(quantize(x, scale, act.bits, offset), scale, offset)

    def _weight(self, weight: Tensor) -> Tensor:
        return fake_weight(weight, self.scheme, self.method)


def fake_weight(weight: Tensor, scheme: LinearScheme, method: str) -> Tensor:
    """A weight [out, in] on its grid."""
    format = scheme.weight
    if format is None:
        return weight
    if format.group and weight.shape[1] % format.group:  # a place may be a part of what a reader reads
        format = Int(format.bits, "channel", symmetric=format.symmetric)
    scale, offset = weight_grid(weight, format, torch.float32, method)
    return dequantize(quantize(weight, scale, format.bits, offset), scale, offset)


def best(
    trial: Trial, candidates: Iterable[float], scale_of: Callable[[float], Tensor]
) -> tuple[float, Tensor, float]:
    """The candidate of least error, its scale and its error; of equals the later one."""
    chosen: tuple[float, Tensor, float] | None = None
    for candidate in candidates:
        scale = scale_of(candidate)
        error = trial.error(scale)
        if chosen is None or error <= chosen[2]:
            chosen = candidate, scale, error
    assert chosen is not None
    return chosen
