"""Run a graph of plain ops, one node at a time, in a dtype that may not be the one it was captured in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Semantics:
    """How dtypes and devices that were baked into a graph are read when it runs."""

    captured: torch.dtype
    """Baked casts to this dtype follow the dtype of execution."""
    dtype: torch.dtype
    """The dtype of execution. In float64 every float is float64, whatever was baked in (proofs need that)."""
    device: torch.device = CPU

    def of(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that stands for a baked one."""
        if not dtype.is_floating_point:
            return dtype
        if self.dtype == torch.float64 or dtype == self.captured:
            return self.dtype
        return dtype

    def argument(self, value: Any) -> Any:
        """A baked argument as it is to be passed."""
        if isinstance(value, torch.dtype):
            return self.of(value)
        return self.device if isinstance(value, torch.device) else value

    def tensor(self, value: Tensor, declared: torch.dtype) -> Tensor:
        """A parameter or buffer in the dtype that stands for the declared one."""
        return value.to(self.of(declared)) if declared.is_floating_point else value


def arguments(
    node: fx.Node, env: Mapping[fx.Node, Any], semantics: Semantics
) -> tuple[tuple, dict[str, Any]]:
    """A node's arguments with values in place of nodes and baked dtypes and devices read by ``semantics``."""

    def value(a: Any) -> Any:
        return env[a] if isinstance(a, fx.Node) else semantics.argument(a)

    args, kwargs = map_aggregate((node.args, dict(node.kwargs)), value)
    return args, kwargs


def call(node: fx.Node, env: Mapping[fx.Node, Any], semantics: Semantics) -> Any:
    """Run one call_function node."""
    assert isinstance(node.target, Callable)
    args, kwargs = arguments(node, env, semantics)
    return node.target(*args, **kwargs)


def interpret(
    graph: fx.Graph, inputs: Sequence[Any], tensors: Mapping[str, Tensor], semantics: Semantics
) -> Any:
    """Run a leaf's graph on positional inputs with its tensors by local name."""
    env: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            env[node] = semantics.tensor(tensors[str(node.target)], node.meta["val"].dtype)
        elif node.op == "output":
            return env[node.args[0]]
        else:
            env[node] = call(node, env, semantics)
    raise AssertionError("a graph without output")
