"""Queries, keys and values on int8 grids: what a quantized cache or a quantized attention makes of them.

A grid whose scale is zero leaves x as it is: so stand the stubs in a graph before calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .quantize import fake_quant_per_token

BITS = 8


def _on_grid(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, offset = scale.to(wide), offset.to(wide)
    step = torch.where(scale > 0, scale, 1.0)
    shifted = (x.to(wide) / step + offset).round().clamp(-128, 127)
    return torch.where(scale > 0, (shifted - offset) * step, x.to(wide)).to(x.dtype)


def channel_grid(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """x [b, heads, t, d] on one int8 grid per channel; ``scale`` and ``offset`` are [heads · d]."""
    size = (1, x.shape[1], 1, x.shape[3])
    return _on_grid(x, scale.view(size), offset.view(size))


def head_grid(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """x [b, heads, t, d] on one int8 grid per head; ``scale`` and ``offset`` are [heads, 1]."""
    return _on_grid(x, scale.view(1, -1, 1, 1), offset.view(1, -1, 1, 1))


def token_grid(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """x [b, heads, t, d] on an int8 grid of its own per head and token, where ``scale`` [1] is above zero."""
    return torch.where(scale > 0, fake_quant_per_token(x, BITS), x)


GRIDS = {"channel": channel_grid, "head": head_grid, "token": token_grid}
"""Scope to the function that puts x on its grid."""


class CacheGrid:
    """What of one projection is cached as int8, on a grid per channel.

    The projection gets the tensors ``kv_cache_scale`` and ``kv_cache_offset``, float32 [heads · d], because that is
    where they stand on disk.
    """

    def __init__(
        self, projection: nn.Module, channels: int, device: torch.device | str | None = None
    ) -> None:
        self.projection = projection
        projection.register_buffer("kv_cache_scale", torch.empty(channels, device=device))
        projection.register_buffer("kv_cache_offset", torch.empty(channels, device=device))

    def __call__(self, x: Tensor) -> Tensor:
        """[b, heads, t, d] as it comes back from the cache."""
        own = self.projection.get_buffer
        return channel_grid(x, own("kv_cache_scale"), own("kv_cache_offset"))


class HeadGrid(nn.Module):
    """One operand of a quantized attention: ``scale`` float32 and ``offset`` int8, [heads, 1]."""

    def __init__(self, heads: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", torch.empty(heads, 1, device=device))
        self.register_buffer("offset", torch.empty(heads, 1, dtype=torch.int8, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[b, heads, t, d] on its grid."""
        return head_grid(x, self.get_buffer("scale"), self.get_buffer("offset"))


class TokenGrid(nn.Module):
    """One operand of a quantized attention, on a grid of its own per head and token; nothing is stored."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, heads, t, d] on its grid."""
        return fake_quant_per_token(x, BITS)
