"""Observers: statistics of linear inputs over the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import Failed
from .operand import Statistic
from .view import LinearHook


def absmax(x: Tensor) -> Tensor:
    """Largest magnitude per channel of rows [n, channels]."""
    return x.abs().amax(0).float()


def extremes(x: Tensor) -> Tensor:
    """Minimum and maximum per channel of rows [n, channels], stacked [2, channels]."""
    return torch.stack([x.amin(0), x.amax(0)]).float()


def widen(old: Tensor, new: Tensor) -> Tensor:
    """The union of two ranges [2, channels]."""
    return torch.stack([torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])])


KINDS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "absmax": (absmax, torch.maximum),
    "range": (extremes, widen),
}
"""Kind of statistic: what it is of some rows, and how two of them are joined."""


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
        for statistic in dict.fromkeys(wanted):
            if statistic.kind not in KINDS:
                raise Failed(f"unknown statistic {statistic.kind!r}; there are {', '.join(KINDS)}")
            self.wanted.setdefault(statistic.module, []).append(statistic)
        self.found: dict[Statistic, Tensor] = {}

    def __call__(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear itself, observed."""
        for statistic in self.wanted.get(name, ()) if x.numel() else ():
            measure, join = KINDS[statistic.kind]
            new = measure(x.reshape(-1, x.shape[-1]))
            old = self.found.get(statistic)
            self.found[statistic] = new if old is None else join(old, new)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def results(self) -> dict[Statistic, Tensor]:
        """All statistics; Failed where one is missing or not finite.

        A linear of an expert that saw no token gets what the same linears of the other experts saw, joined.
        """
        seen = dict(self.found)
        for module, statistics in self.wanted.items():
            for statistic in statistics:
                value = self.found.get(statistic)
                if value is None:
                    value = self.found[statistic] = self._of_peers(statistic, seen)
                    self.unseen.append(module)
                if not bool(torch.isfinite(value).all()):
                    raise Failed(
                        f"{module}: its input is not finite on the calibration data. Look for inf or NaN in the "
                        "weights before it, or compute in another --dtype (float32)"
                    )
        return self.found

    def _of_peers(self, statistic: Statistic, seen: Mapping[Statistic, Tensor]) -> Tensor:
        others = [Statistic(statistic.kind, peer) for peer in self.peers.get(statistic.module, ())]
        values = [seen[other] for other in others if other in seen]
        if not values:
            raise Failed(
                f"{statistic.module} saw no calibration data: "
                + ("no token was sent to it. Give more --samples" if others else "it was never run")
            )
        return reduce(KINDS[statistic.kind][1], values)
