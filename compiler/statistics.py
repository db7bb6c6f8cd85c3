"""Statistics: what is kept of the input rows of a linear while calibration data go by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from .device import doubled

ROWS = 512
"""Rows that a sample keeps."""
BINS = 4096
"""Bins of a histogram on each side of zero."""


class Observed(ABC):
    """One statistic in the making. ``add`` takes rows [n, channels]; n may be any number, in any order of batches."""

    @abstractmethod
    def add(self, rows: Tensor) -> None:
        """Take rows in."""

    @abstractmethod
    def join(self, other: Observed) -> None:
        """Take in what another one of the same kind saw."""

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """What was found, float32."""


class AbsMax(Observed):
    """``absmax`` [channels]: the largest magnitude of each channel."""

    def __init__(self) -> None:
        self.found: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take rows in."""
        self._widen(rows.abs().amax(0).float())

    def join(self, other: Observed) -> None:
        """Take in what another one saw."""
        self._widen(other.value)

    def _widen(self, new: Tensor) -> None:
        self.found = new if self.found is None else torch.maximum(self.found, new)

    @property
    def value(self) -> Tensor:
        """[channels]."""
        assert self.found is not None
        return self.found


class Range(Observed):
    """``range`` [2, channels]: minimum and maximum of each channel."""

    def __init__(self) -> None:
        self.found: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take rows in."""
        self._widen(torch.stack([rows.amin(0), rows.amax(0)]).float())

    def join(self, other: Observed) -> None:
        """Take in what another one saw."""
        self._widen(other.value)

    def _widen(self, new: Tensor) -> None:
        old = new if self.found is None else self.found
        self.found = torch.stack([torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])])

    @property
    def value(self) -> Tensor:
        """[2, channels]."""
        assert self.found is not None
        return self.found


class Mean(Observed):
    """``absmean`` and ``meansquare`` [channels]: the mean of |x| or of x² of each channel, over all rows."""

    def __init__(self, power: int) -> None:
        self.power, self.total, self.count = power, torch.zeros(()), 0

    def add(self, rows: Tensor) -> None:
        """Take rows in."""
        self.total = self.total + doubled(rows.abs()).pow(self.power).sum(0)
        self.count += rows.shape[0]

    def join(self, other: Observed) -> None:
        """Take in what another one saw."""
        assert isinstance(other, Mean)
        self.total, self.count = self.total + other.total, self.count + other.count

    @property
    def value(self) -> Tensor:
        """[channels]."""
        return (self.total / max(self.count, 1)).float()


class Sample(Observed):
    """``rows`` [up to 512, channels], ``rows:N`` [up to N, channels]: drawn at random without replacement.

    Which ones is a function of how many came alone.
    """

    def __init__(self, size: int = ROWS) -> None:
        self.size = size
        self.generator = torch.Generator().manual_seed(0)
        self.rows, self.priority = torch.empty(0), torch.empty(0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take rows in."""
        priority = torch.rand(len(rows), generator=self.generator, dtype=torch.float64)
        best = priority.topk(min(self.size, len(rows))).indices.sort().values
        self._keep(rows[best.to(rows.device)].float(), priority[best])

    def join(self, other: Observed) -> None:
        """Take in what another one saw."""
        assert isinstance(other, Sample)
        self._keep(other.rows, other.priority)

    def _keep(self, rows: Tensor, priority: Tensor) -> None:
        both = torch.cat([self.priority, priority])
        all_rows = torch.cat([self.rows.to(rows).view(-1, rows.shape[-1]), rows])
        best = both.topk(min(self.size, len(both))).indices.sort().values
        self.rows, self.priority = all_rows[best.to(all_rows.device)], both[best]

    @property
    def value(self) -> Tensor:
        """[rows, channels]."""
        return self.rows


class Histogram(Observed):
    """``histogram`` [2, bins]: how many values of all channels lie in each bin, and the middles of the bins.

    Bins have one width, a power of two, and zero is the edge of one; when values come that lie outside, pairs of
    bins become one. So nothing is interpolated and the order of the data does not matter.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * BINS, dtype=torch.float64)
        self.exponent: int | None = None
        self.range = torch.tensor([torch.inf, -torch.inf])
        self.finite = True

    def add(self, rows: Tensor) -> None:
        """Take rows in."""
        flat = rows.detach().flatten().float()
        if not bool(torch.isfinite(flat).all()):
            self.finite = False
            return
        low, high = (one.cpu() for one in torch.aminmax(flat))
        self.range = torch.stack([torch.minimum(self.range[0], low), torch.maximum(self.range[1], high)])
        self._fit(float(torch.maximum(-low, high)))
        assert self.exponent is not None
        # exact, for the factor is a power of two: only what falls below 1e-38 may change its side of zero
        index = (flat * 2.0**-self.exponent).floor().clamp(-BINS, BINS - 1).long() + BINS
        self.counts += torch.bincount(index, minlength=2 * BINS).cpu()

    def join(self, other: Observed) -> None:
        """Take in what another one saw."""
        assert isinstance(other, Histogram)
        self.finite = self.finite and other.finite
        if other.exponent is None:
            return
        self._fit(2.0**other.exponent * BINS)
        assert self.exponent is not None
        counts = other.counts
        for _ in range(self.exponent - other.exponent):
            counts = _halved(counts)
        self.counts += counts
        self.range = torch.stack(
            [torch.minimum(self.range[0], other.range[0]), torch.maximum(self.range[1], other.range[1])]
        )

    def _fit(self, largest: float) -> None:
        """Make bins so wide that ``largest`` and its negative lie in one."""
        needed = -40 if largest == 0 else int(torch.tensor(largest / BINS).log2().ceil())
        if self.exponent is None:
            self.exponent = needed
        while self.exponent < needed:
            self.counts, self.exponent = _halved(self.counts), self.exponent + 1

    @property
    def value(self) -> Tensor:
        """Counts and middles, from the first bin that is not empty to the last; the outer ones are the exact range.

        NaN where a value was not finite.
        """
        if not self.finite:
            return torch.full((2, 1), torch.nan)
        assert self.exponent is not None
        filled = self.counts.nonzero().flatten()
        first, last = int(filled[0]), int(filled[-1])
        middles = (torch.arange(first, last + 1).double() - BINS + 0.5) * 2.0**self.exponent
        middles[0], middles[-1] = float(self.range[0]), float(self.range[1])
        return torch.stack([self.counts[first : last + 1], middles]).float()


def _halved(counts: Tensor) -> Tensor:
    """Counts in bins of twice the width: pairs are added, outwards from zero nothing is lost."""
    pairs = counts.view(-1, 2).sum(1)
    return torch.nn.functional.pad(pairs, (BINS // 2, BINS // 2))


class AbsMean(Mean):
    """``absmean``: see ``Mean``."""

    def __init__(self) -> None:
        super().__init__(1)


class MeanSquare(Mean):
    """``meansquare``: see ``Mean``."""

    def __init__(self) -> None:
        super().__init__(2)


class Hessian(Observed):
    """``hessian`` [channels, channels]: the mean of ``x xᵀ`` over rows x."""

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(()), 0

    def add(self, rows: Tensor) -> None:
        """Take rows in."""
        rows = rows.float()
        self.total, self.count = self.total + rows.T @ rows, self.count + len(rows)

    def join(self, other: Observed) -> None:
        """Take in what another one saw."""
        assert isinstance(other, Hessian)
        self.total, self.count = self.total + other.total, self.count + other.count

    @property
    def value(self) -> Tensor:
        """[channels, channels]."""
        return self.total / max(self.count, 1)


KINDS: Mapping[str, type[Observed]] = {
    "absmax": AbsMax,
    "range": Range,
    "absmean": AbsMean,
    "meansquare": MeanSquare,
    "rows": Sample,
    "histogram": Histogram,
    "hessian": Hessian,
}
"""What a ``Statistic`` may ask for."""


def observed(kind: str) -> Observed | None:
    """A statistic in the making; None for a kind that there is not."""
    name, _, size = kind.partition(":")
    if name == "rows" and size.isdecimal():
        return Sample(int(size))
    return KINDS[name]() if name in KINDS and not size else None
