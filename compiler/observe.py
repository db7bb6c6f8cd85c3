"""Observers: statistics of linear inputs over the calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from .errors import Failed
from .operand import Statistic
from .statistics import KINDS, Observed, observed
from .view import LinearHook


class RowCounts:
    """A linear hook that counts the rows which some linears read, and leaves the work to another hook."""

    def __init__(self, modules: Iterable[str], inner: LinearHook | None) -> None:
        self.rows, self.inner = dict.fromkeys(modules, 0), inner

    def __call__(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear itself, or what the inner hook makes of it."""
        if name in self.rows:
            self.rows[name] += x.shape[0]
        if self.inner is not None:
            return self.inner(name, x, weight, bias)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Observers:
    """A linear hook that computes what the model computes and collects statistics on the way."""

    def __init__(self, wanted: Iterable[Statistic], peers: Mapping[str, Sequence[str]] | None = None) -> None:
        """``peers`` names for the linear of an expert the same one of all experts of its layer."""
        self.peers = peers or {}
        self.unseen: list[str] = []
        """Linears of experts that no calibration token was sent to: see ``results``."""
        self.wanted: dict[str, list[Statistic]] = {}
        """By linear, or by ``attention:operand``."""
        for statistic in dict.fromkeys(wanted):
            if observed(statistic.kind) is None:
                raise Failed(f"unknown statistic {statistic.kind!r}; there are {', '.join(KINDS)}")
            self.wanted.setdefault(statistic.module, []).append(statistic)
        self.seen: dict[Statistic, Observed] = {}

    def __call__(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear itself, observed."""
        for statistic in self.wanted.get(name, ()) if x.numel() else ():
            self._take(statistic, x)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def on_value(self, node: fx.Node, given: tuple[Any, ...], value: Any) -> None:
        """Observe q, k and v [b, heads, t, d] of an attention as rows [b · t, heads · d]."""
        for operand in range(3):
            for statistic in self.wanted.get(f"{node.name}:{operand}", ()):
                x = given[node.all_input_nodes.index(node.args[operand])]
                self._take(statistic, x.transpose(1, 2).flatten(2))

    def _take(self, statistic: Statistic, x: Tensor) -> None:
        if statistic not in self.seen:
            self.seen[statistic] = made(statistic)
        self.seen[statistic].add(x.reshape(-1, x.shape[-1]))

    def results(self) -> dict[Statistic, Tensor]:
        """All statistics; Failed where one is missing or not finite.

        A linear of an expert that saw no token gets what the same linears of the other experts saw, joined.
        """
        found: dict[Statistic, Tensor] = {}
        for module, statistics in self.wanted.items():
            for statistic in statistics:
                seen = self.seen.get(statistic)
                if seen is None:
                    seen = self._of_peers(statistic)
                    self.unseen.append(module)
                value = found[statistic] = seen.value
                if not bool(torch.isfinite(value).all()):
                    raise Failed(
                        f"{module}: its input is not finite on the calibration data. Look for inf or NaN in the "
                        "weights before it, or compute in another --dtype (float32)"
                    )
        return found

    def _of_peers(self, statistic: Statistic) -> Observed:
        others = [Statistic(statistic.kind, peer) for peer in self.peers.get(statistic.module, ())]
        seen = [self.seen[other] for other in others if other in self.seen]
        if not seen:
            raise Failed(
                f"{statistic.module} saw no calibration data: "
                + ("no token was sent to it. Give more --samples" if others else "it was never run")
            )
        joined = made(statistic)
        for one in seen:
            joined.join(one)
        return joined


def made(statistic: Statistic) -> Observed:
    """An empty one of a known kind."""
    found = observed(statistic.kind)
    assert found is not None, "checked"
    return found
