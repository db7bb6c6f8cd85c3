"""Settle: what a plan leaves float only once the calibration data is there (``--fallback``, ``fa_amp``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .contract import Pass
from .errors import Refused
from .fallback import attentions_to_leave, level, loudest_attentions, most_sensitive, quantizers, without
from .plan import Plan
from .solve import Progress

Replan = Callable[[Iterable[Pass]], Plan]
"""The plan with other passes; Refused where it has problems."""


def settled(
    planned: Plan, fallback: str, ids: Tensor, compute: torch.dtype, replan: Replan,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Plan:  # fmt: skip
    """The plan with the linears and the attentions left float that its options only count.

    Args:
        planned: A plan without problems.
        fallback: ``Lk``: the k places whose rounding costs most stay float.
        ids: Calibration tokens [n, length].
        compute: Dtype of the runs.
        replan: Makes the plan again.
        report: Told of the progress.
    """
    if count := level(fallback):
        if not quantizers(step.what for step in planned.steps):
            raise Refused(f"--fallback {fallback}: no pass of this plan quantizes linears; leave it out")
        left = most_sensitive(planned, ids, count, compute, report)
        again = replan(without(planned.steps, left.linears))
        planned = replace(again, notes=(*planned.notes, f"fallback {fallback}: {left}"))
    return (
        _attentions_left(planned, ids, compute, replan, report) if attentions_to_leave(planned) else planned
    )


def _attentions_left(
    planned: Plan, ids: Tensor, compute: torch.dtype, replan: Replan, report: Callable[[Progress], None]
) -> Plan:
    passes, told = [step.what for step in planned.steps], []
    for step in planned.steps:
        count = int(step.what.options().get("fa_amp", 0))
        if not count:
            continue
        names = loudest_attentions(planned, step, ids, compute, report)
        one: Any = step.what
        passes[step.index] = replace(one, fa_amp=0, exclude=(*one.exclude, *names[:count]))
        told.append(f"fa_amp={count}: {', '.join(names[:count])} stay float, where the grids are heard most")
    return replace(replan(passes), notes=(*planned.notes, *told))
