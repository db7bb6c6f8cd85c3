"""A linear whose input is scaled channel by channel first, for scales that nothing before it could take in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEAF, INNER = "div.mul_scale", "linear"
"""Where the reciprocals stand below the module, and where the linear itself stands."""


def owner_of(name: str) -> tuple[str, str]:
    """The linear that a qualified tensor name belongs to, and the rest of the name."""
    owner = name.removesuffix(f".{LEAF}")
    if owner != name:
        return owner, LEAF
    module, _, local = name.rpartition(".")
    return module, local


def divided(x: Tensor, reciprocal: Tensor) -> Tensor:
    """x [..., in] times the stored reciprocals [in], in the dtype of x."""
    return x * reciprocal.to(x.dtype)


class Reciprocals(nn.Module):
    """``mul_scale`` [in]: what each channel is multiplied by."""

    def __init__(self, channels: int, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("mul_scale", torch.empty(channels, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] scaled."""
        return divided(x, self.get_buffer("mul_scale"))


class DividedLinear(nn.Module):
    """``linear(x · mul_scale)``; its tensors are ``div.mul_scale`` and those of ``linear``."""

    def __init__(self, linear: nn.Module, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.div, self.linear = Reciprocals(channels, dtype, device="meta"), linear

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.linear(self.div(x))
