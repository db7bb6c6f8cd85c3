"""Measured: what the linears of a part read and hold, and how much noise their integers make, on the proof rows."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, log10

from torch import Tensor
from torch.nn import functional as F

from ..runtime.quantized import QuantizedLinear
from .fake_quant import fake_act
from .scheme import LinearScheme
from .spread import Spread, spread_of


class Spreads:
    """A linear hook that computes the linear and keeps the spreads of its input and of its weight.

    Of the input the calibration row counts, and for an expert all the rows that it has.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Spread] = {}
        self.weights: dict[str, Spread] = {}

    def __call__(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear itself."""
        if x.numel():
            self.inputs[name] = spread_of(calibration_row(x))
        self.weights[name] = spread_of(weight.float())
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def numbers(self) -> dict[str, dict[str, dict[str, float]]]:
        """By linear, then ``weight`` and ``input``."""
        return {
            name: {"weight": self.weights[name].numbers()}
            | ({"input": self.inputs[name].numbers()} if name in self.inputs else {})
            for name in self.weights
        }


class Noise(Spreads):
    """The same for a part whose weights are solved, with signal to quantization noise in dB.

    Args:
        quantized: The integers of its linears.
        schemes: Their formats.
    """

    def __init__(self, quantized: Mapping[str, QuantizedLinear], schemes: Mapping[str, LinearScheme]) -> None:
        super().__init__()
        self.quantized, self.schemes = quantized, schemes
        self.output_db: dict[str, float] = {}
        """Of the output of a linear, with its input on its grid too."""
        self.weight_db: dict[str, float] = {}
        """Of the weight alone, all entries alike."""

    def __call__(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float linear, compared with the quantized one."""
        y = super().__call__(name, x, weight, None)
        if name in self.quantized:
            q, rows = self.quantized[name], calibration_row(x)
            dense = q.dense
            self.weight_db[name] = decibels(weight.float(), dense)
            noisy = F.linear(fake_act(rows, self.schemes[name], q), dense.to(x.dtype))
            self.output_db[name] = decibels(y[: len(rows)], noisy)
        return y if bias is None else y + bias.to(x.dtype)


def calibration_row(x: Tensor) -> Tensor:
    """The first row of proof rows [2, tokens, channels], which is calibration text; of an expert's rows all."""
    return x[:1] if x.dim() > 2 else x


def decibels(signal: Tensor, noisy: Tensor) -> float:
    """The signal to noise ratio of ``noisy`` in dB; infinite where they are equal."""
    noise = float((noisy - signal).square().sum())
    return 10 * log10(float(signal.square().sum()) / noise) if noise > 0 else inf
