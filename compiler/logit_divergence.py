"""Divergence of logits: how far what one model says is from what another says, in nats per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, float64

from .evaluate import ROWS

Logits = Callable[[int], Tensor]
"""Number of a microbatch to its logits [tokens, vocabulary]."""


def divergence(reference: Tensor, other: Tensor) -> float:
    """Sum over tokens of KL(reference || other) of logits [tokens, vocabulary], in nats."""
    total = 0.0
    for p, q in zip(reference.split(ROWS), other.split(ROWS), strict=True):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(dtype=float64))
    return total


def divergences_of(reference: Logits, others: Sequence[Logits], batches: int) -> list[float]:
    """KL(reference || other) of each of some others, mean over the tokens; infinite where one computes NaN."""
    totals, count = [0.0] * len(others), 0
    for index in range(batches):
        own = reference(index)
        count += own.shape[0]
        totals = [total + divergence(own, other(index)) for total, other in zip(totals, others, strict=True)]
    return [math.inf if math.isnan(total) else total / count for total in totals]
