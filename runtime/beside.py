"""Beside: what of a linear stays in float beside its integers, as tensors of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

Held = Callable[[str], Tensor]
"""Looks up one of the tensors by the last part of its name."""


class Beside(ABC):
    """One kind of float part, of a size that is known before any weight is read."""

    suffix: ClassVar[str]
    """What the type string of a linear ends in that has one."""
    leaves: ClassVar[tuple[str, ...]]
    """Last parts of the names of its tensors."""

    @classmethod
    @abstractmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """The one whose tensors have these shapes, by leaf. ValueError where they are not those of one."""

    @abstractmethod
    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Leaf to (dtype, shape) of everything stored, in a model of ``dtype``."""

    def rest(self, x: Tensor, held: Held) -> Tensor:
        """What the integers read of x [..., in]."""
        return x

    @abstractmethod
    def product(self, x: Tensor, held: Held) -> Tensor:
        """What is added to the integers' result: x [..., in] to [..., out], in the dtype of x or float32."""

    def wrong(self, leaf: str, tensor: Tensor, in_features: int) -> str:
        """What of the values of a stored tensor can not be, or nothing; that floats are finite is asked elsewhere."""
        return ""
