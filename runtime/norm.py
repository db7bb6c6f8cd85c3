"""RMSNormBias: the norm that asymmetric smoothing leaves behind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .op import define


def _normed(x: Tensor, eps: float) -> Tensor:
    """x [..., width] over its root mean square, float32."""
    rows = x.to(torch.float32)
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)


def _kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normed(x, eps).to(x.dtype) * weight.to(x.dtype)


def _npu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.ops.npu.npu_rms_norm(x, weight, eps)[0]


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


RMS_NORM = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", kernel=_kernel, fake=_fake, npu=_npu
)
"""``x / sqrt(mean(x²) + eps) * weight`` of x [..., width] and weight [width], the mean in float32."""


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
        if self.offset:
            normed = (_normed(x, self.eps) * (self.weight.to(torch.float32) + self.offset)).to(x.dtype)
        else:
            normed = RMS_NORM(x, self.weight, self.eps)
        return normed + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """Size and constants, for printing."""
        return f"{self.weight.shape[0]}, eps={self.eps}, offset={self.offset}"
