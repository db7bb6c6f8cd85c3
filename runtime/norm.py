"""RMSNormBias: the norm that asymmetric smoothing leaves behind."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNormBias(nn.Module):
    """``x / sqrt(mean(x²) + eps) * (weight + offset) + bias``, as served: rounded before the bias.

    ``state_dict``: weight and bias, [width] in the model's dtype.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float,
        offset: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.register_buffer("weight", torch.full((width,), 1 - offset, dtype=dtype, device=device))
        self.register_buffer("bias", torch.zeros(width, dtype=dtype, device=device))

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width] in the dtype of x; the mean is taken in float32."""
        rows = x.to(torch.float32)
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            normed = (rows * (self.weight.to(torch.float32) + self.offset)).to(x.dtype)
        else:
            normed = rows.to(x.dtype) * self.weight.to(x.dtype)
        return normed + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """Size and constants, for printing."""
        return f"{self.weight.shape[0]}, eps={self.eps}, offset={self.offset}"
