"""Spread: what the values of a tensor are like, which is why a linear is easy or hard to quantize."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """Lowest and highest value, and excess kurtosis: zero for a normal distribution, large where there are outliers."""

    low: float
    high: float
    kurtosis: float

    def numbers(self) -> dict[str, float]:
        """By name, with three digits: what is stable where the last bits are not."""
        return {
            name: float(f"{value:.3g}")
            for name, value in (("low", self.low), ("high", self.high), ("kurtosis", self.kurtosis))
        }


def spread_of(values: Tensor) -> Spread:
    """The spread of all values of a float tensor that is not empty."""
    low, high = values.aminmax()
    return Spread(float(low), float(high), kurtosis(values))


def kurtosis(values: Tensor) -> float:
    """Excess kurtosis of all values of a tensor, computed in its dtype; 0 where they are all the same."""
    centred = values - values.mean()
    square = centred.mul_(centred)
    variance = float(square.mean())
    return float(square.mul_(square).mean()) / variance**2 - 3 if variance > 0 else 0.0
