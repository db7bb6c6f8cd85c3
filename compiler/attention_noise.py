"""How much an attention's output changes when its operands are put on int8 grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime.attention_grid import head_grid
from ..runtime.quantize import fake_quant_per_token, scale_for
from .device import doubled


class AttentionNoise:
    """An observer of values that computes attentions again, quantized; ranges are those of each microbatch.

    ``grids`` maps the node of an attention to its operands that are quantized (0, 1, 2: q, k, v), each with what shares
    a scale: ``head`` or ``token``. Errors are relative, channel by channel: a huge channel hides nothing.
    """

    def __init__(self, grids: Mapping[str, Mapping[int, str]]) -> None:
        self.grids = grids
        self.noise: dict[str, Tensor] = {}
        self.signal: dict[str, Tensor] = {}

    def __call__(self, node: fx.Node, given: tuple[Any, ...], value: Any) -> None:
        """Take in one run of a node."""
        if node.name not in self.grids:
            return
        known = dict(zip(node.all_input_nodes, given, strict=True))
        args = list(fx.node.map_arg(node.args, known.__getitem__))
        for operand, scope in self.grids[node.name].items():
            args[operand] = _on_grid(args[operand], scope)
        again = node.target(*args, **fx.node.map_arg(node.kwargs, known.__getitem__))  # type: ignore[operator]
        for sums, x in ((self.noise, again - value), (self.signal, value)):
            sums[node.name] = sums.get(node.name, 0) + doubled(x).square().sum((0, 2))

    def errors(self) -> dict[str, float]:
        """Root of the mean relative square error over channels, by node."""
        return {
            name: float((noise / self.signal[name].clamp(min=1e-30)).mean().sqrt())
            for name, noise in self.noise.items()
        }


def _on_grid(x: Tensor, scope: str) -> Tensor:
    """x [b, heads, t, d] on the int8 grid of every token or of every head."""
    if scope == "token":
        return fake_quant_per_token(x, 8)
    scale = scale_for(x.abs().amax((0, 2, 3)), 8)[:, None]
    return head_grid(x, scale, torch.zeros_like(scale))
