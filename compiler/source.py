"""Sources of weights that are not a checkpoint on disk: a model in memory, and a model that has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .errors import Refused


class InMemory:
    """Weights that are tensors in memory, by parameter or persistent buffer name (``WeightSource``)."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}

    def names(self) -> Iterable[str]:
        """All names."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensors[name].dtype

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors themselves, detached; they share memory with the model."""
        return {name: self._tensors[name] for name in names}

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Refuse a tensor that holds NaN or infinity."""
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Refused(f"{name} of the model in memory holds NaN or infinity; mend the model first")


class ShapesOnly:
    """A model of which only the config is known: shapes and dtypes, no weights (``WeightSource``)."""

    def __init__(self, model: nn.Module, why: str = "captured from a config alone") -> None:
        self.why = why
        self._meta = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def names(self) -> Iterable[str]:
        """All names."""
        return self._meta.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return tuple(self._meta[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a parameter."""
        return self._meta[name].dtype

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Refuse: there are no weights."""
        raise Refused(f"{self.why}.\nThis can be planned; to compile it, give a checkpoint with its weights.")

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """There is nothing to check."""
