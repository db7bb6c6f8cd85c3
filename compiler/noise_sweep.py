"""Noise sweep: how far rounding each place of a model changes what the model says, measured in one run.

Block after block runs on calibration tokens with float weights, after all float rewrites. At block l

- the block runs once per place and format with only that place rounded to nearest; e is the mean over tokens of
  ``|y' - y|^2 / |y|^2`` at the output of the block;
- at `CARRIERS` blocks, first and last among them, the block runs once with all its places rounded to their fewest
  bits, error E. A stream of its own takes ``y + t (y' - y)`` through all later blocks in float, with t so small that
  the error is at most `CARRIED`. At the end it gives the divergence of the logits, KL nats per token.

The divergence is a quadratic form of a small error, so a place in a format costs about ``e KL / (t^2 E)`` nats, and
places add up. Between carriers ``KL / (t^2 E)`` is interpolated over depth, in logarithms. Work: a block runs once for
each format of each place and for each carrier before it; weights are read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import Failed
from .fake_quant import quantized_linears
from .logit_divergence import divergences_of
from .menu import Place
from .nearest import Nearest, alone
from .observe import Observers
from .part_work import cast
from .program import Part, Program
from .roles import mixtures, peers
from .scheme import LinearScheme
from .solve import Progress
from .streams import Stream, Values, needed_after, prologue

TOKENS = 1024
"""Calibration tokens, in whole sequences, on which formats are compared."""
CARRIED = 0.01
"""Largest squared relative error that is carried to the logits."""
CARRIERS = 12
"""Blocks whose noise is carried to the logits."""
TINY = 1e-12


@dataclass
class _Carried:
    """The noise of one block on its way to the logits."""

    stream: Stream
    block: int
    share: float
    """t squared."""
    error: float
    """E."""


@dataclass
class NoiseSweep:
    """Watches a solve of the float rewrites (``Solver.watch``) and measures every place on the way."""

    program: Program
    """After all float rewrites, without integers."""
    places: Sequence[Place]
    ids: Tensor
    """Tokens [n, length]; a sequence runs at a time."""
    compute: torch.dtype
    report: Callable[[Progress], None] = lambda progress: None
    local: dict[tuple[int, LinearScheme], float] = field(default_factory=dict)
    """Error of a block with one place rounded: number of the place and format."""
    carried: list[_Carried] = field(default_factory=list)
    divergence: dict[int, float] = field(default_factory=dict)
    """Nats per token and unit of squared relative error at the output of a block, by index of the part."""

    def __post_init__(self) -> None:
        offered: dict[LinearScheme, list[str]] = {}
        for place in self.places:
            for one in place.options:
                offered.setdefault(one, []).extend(place.linears if one.quantized else ())
        self.nearest = {
            one: Nearest(self.program, alone(self.program, names, one))
            for one, names in offered.items()
            if names
        }
        self.needed = needed_after(self.program)
        self.peers = peers(mixtures(self.program))
        self.clean = Stream((), self.compute)
        parts = list(dict.fromkeys(p.part for p in self.places if any(one.quantized for one in p.options)))
        count = min(CARRIERS, len(parts))
        self.carriers = {parts[round(k * (len(parts) - 1) / max(count - 1, 1))] for k in range(count)}

    def __call__(self, part: Part, tensors: Mapping[str, Tensor]) -> None:
        """Take in one part, with its float32 tensors as the passes left them."""
        last = len(self.program.parts) - 1
        if part.index == 0:
            self.clean = prologue(self.program, tensors, self.ids, 1, self.compute, ())
        elif part.index == last:
            self._logits(part, cast(tensors, self.compute))
        else:
            self._block(part, tensors)

    def costs(self) -> list[list[float]]:
        """Nats per token that each option of each place costs, by the order of the menu.

        Raises:
            Failed: A block that is rounded somewhere computes no finite number.
        """
        for (i, one), error in self.local.items():
            if not math.isfinite(error):
                raise Failed(
                    f"{self.places[i]} as {one}: what the block makes of it is not finite on the calibration data."
                    " Compute in another --dtype (float32), or leave the format out"
                )
        known = sorted(self.divergence)
        logs = [math.log(max(self.divergence[at], TINY)) for at in known]
        weight = {p.part: math.exp(np.interp(p.part, known, logs)) if known else 0.0 for p in self.places}
        return [
            [self.local.get((i, one), 0.0) * weight[place.part] for one in place.options]
            for i, place in enumerate(self.places)
        ]

    def _block(self, part: Part, tensors: Mapping[str, Tensor]) -> None:
        lowered = cast(tensors, self.compute)
        here = [i for i, place in enumerate(self.places) if place.part == part.index]
        self._tell(part, f"noise of {len(here)} places, {len(self.carried)} streams")
        for one in self.carried:
            one.stream.advance(one.stream.outputs(self.program, part, lowered), self.needed[part.index])
        names = [name for i in here for name in self.places[i].linears]
        observers = Observers(
            (need for n in self.nearest.values() for name in names for need in n.needs(name)), self.peers
        )
        outputs = self.clean.outputs(self.program, part, lowered, observers)
        statistics = observers.results() if observers.wanted else {}
        integers: dict[str, Any] = {}
        schemes: dict[str, LinearScheme] = {}
        for i in here:
            place = self.places[i]
            for one in place.options:
                if not one.quantized:
                    continue
                q, s = self.nearest[one].of(part.name, tensors, place.linears, statistics)
                hook = quantized_linears(q, s, self.compute)
                self.local[i, one] = error_of(outputs, self.clean.outputs(self.program, part, lowered, hook))
                if part.index in self.carriers and one == next(o for o in place.options if o.quantized):
                    integers, schemes = {**integers, **q}, {**schemes, **s}
        if integers:
            self._carry(
                part,
                outputs,
                self.clean.outputs(
                    self.program, part, lowered, quantized_linears(integers, schemes, self.compute)
                ),
            )
        self.clean.advance(outputs, self.needed[part.index])

    def _carry(self, part: Part, outputs: Sequence[Values], noisy: Sequence[Values]) -> None:
        error = error_of(outputs, noisy)
        share = min(1.0, CARRIED / max(error, TINY))
        mixed = [
            {name: _between(value, other[name], share**0.5) for name, value in own.items()}
            for own, other in zip(outputs, noisy, strict=True)
        ]
        stream = Stream((), self.compute, list(self.clean.batches))
        stream.advance(mixed, self.needed[part.index])
        self.carried.append(_Carried(stream, part.index, share, error))

    def _logits(self, part: Part, tensors: Mapping[str, Tensor]) -> None:
        self._tell(part, f"logits of {len(self.carried)} streams")
        clean, *noisy = (
            partial(stream.logits, program=self.program, part=part, tensors=tensors)
            for stream in (self.clean, *(one.stream for one in self.carried))
        )
        found = divergences_of(clean, noisy, len(self.clean.batches))
        for kl, one in zip(found, self.carried, strict=True):
            self.divergence[one.block] = kl / max(one.share * one.error, TINY)

    def _tell(self, part: Part, what: str) -> None:
        self.report(Progress(part.name, part.index, len(self.program.parts), what))


def error_of(clean: Sequence[Values], noisy: Sequence[Values]) -> float:
    """Mean over tokens of the squared relative error of what a block hands on."""
    total, count = 0.0, 0
    for want, got in zip(clean, noisy, strict=True):
        for name, value in want.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                error = (got[name].float() - value.float()).square().mean(-1)
                ratio = error / value.float().square().mean(-1).clamp(min=TINY)
                total, count = total + float(ratio.sum()), count + ratio.numel()
    return total / max(count, 1)


def _between(value: Any, other: Any, t: float) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value + (t * (other.float() - value.float())).to(value.dtype)
