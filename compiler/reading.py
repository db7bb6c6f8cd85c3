"""Reading: how parameters of a model come from tensors on disk, and the run of one conversion of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Reading:
    """How parameters come from tensors on disk: by name, or through one conversion of transformers."""

    first: str
    """Name that transformers gives to the group; of several parameters, the first."""
    sources: tuple[tuple[str, str], ...]
    """Tensors on disk, each with the source pattern of the conversion that it matches."""
    renamed: tuple[str, ...] = ()
    """The tensors on disk after renaming and before conversion; the conversion is inverted to these names."""
    converter: Any = None
    """A ``WeightConverter`` of transformers, or None for a tensor that keeps its values."""

    def convert(self, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """Parameters by name, from tensors by their names on disk."""
        if self.converter is None:
            return {self.first: tensors[self.sources[0][0]]}
        given = [(self.first, disk, pattern, tensors[disk]) for disk, pattern in self.sources]
        return run(deepcopy(self.converter), given, model)


def run(
    converter: Any, given: Iterable[tuple[str, str, str, torch.Tensor]], model: nn.Module
) -> dict[str, torch.Tensor]:
    """Run a ``WeightConverter`` on tensors, each with target name, source name and pattern."""
    given = list(given)
    for item in given:
        converter.add_tensor(*item)
    result: dict[str, Any] = converter.convert(
        given[0][0], model=model, config=getattr(model, "config", None)
    )
    return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}


def with_prefix_of(name: str, converted: str, renamed: str) -> str:
    """Give a renamed key the base prefix that its parameter has, or take it away."""
    if name.endswith(f".{converted}"):
        return name[: -len(converted)] + renamed
    if converted.endswith(f".{name}"):
        return renamed[len(converted) - len(name) :]
    return renamed
