"""Outlier channels beside a linear: input channels that are not quantized, computed in float with their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .beside import Beside, Held

CHANNELS = ("outlier_index", "outlier_weight")
"""Names of the tensors beside those of a linear: channels [places], -1 where a place is not used; [out, places]."""


def without(x: Tensor, index: Tensor) -> Tensor:
    """x [..., in] with zeros in the channels of ``index`` [places]."""
    kept = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    kept[index[index >= 0].long()] = 0
    return x * kept


def outlier_channels(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """What the channels of ``index`` [places] of x [..., in] add, by their weights [out, places], in the dtype of x."""
    used = index >= 0
    return F.linear(x[..., index[used].long()], weight[:, used].to(x.dtype))


@dataclass(frozen=True)
class OutlierChannels(Beside):
    """``places`` input channels and their weights in the dtype of the model; the integers see zeros there.

    So a scale per token is that of the other channels. Source: LLM.int8() (arXiv 2208.07339), section 3.2.
    """

    places: int
    suffix = "_OUTLIERS"
    leaves = CHANNELS

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> OutlierChannels:
        """From the length of the index."""
        if len(shapes.get(CHANNELS[0], ())) != 1:
            raise ValueError(f"{CHANNELS[0]} is missing or has not one axis")
        return cls(shapes[CHANNELS[0]][0])

    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """int32 [places] and [out, places]."""
        shapes = (torch.int32, (self.places,)), (dtype, (out_features, self.places))
        return dict(zip(CHANNELS, shapes, strict=True))

    def rest(self, x: Tensor, held: Held) -> Tensor:
        """Zeros in the channels that are computed in float."""
        return without(x, held(CHANNELS[0]))

    def product(self, x: Tensor, held: Held) -> Tensor:
        """Those channels times their weights."""
        return outlier_channels(x, *map(held, CHANNELS))

    def wrong(self, leaf: str, tensor: Tensor, in_features: int) -> str:
        """Channels are different ones of the input."""
        if leaf != CHANNELS[0]:
            return ""
        used = tensor[tensor != -1]
        if bool(((used < 0) | (used >= in_features)).any()):
            return f"channels are -1 or 0 to {in_features - 1}"
        return "" if len(used.unique()) == len(used) else "a channel stands there twice"

    def __str__(self) -> str:
        return "outlier channels"
