"""A limit on memory: smaller microbatches until the estimate fits, or a refusal that names the largest item."""

from __future__ import annotations

import re
from dataclasses import replace

from .cost import size
from .errors import Refused
from .memory import largest_of, peak_of
from .plan import Plan

UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def limit_of(text: str) -> int:
    """Bytes of ``cpu=8GiB``, or of ``8GiB``.

    Raises:
        Refused: A device other than the cpu, on which blocks are solved; a size that is none.
    """
    limit = 0
    for word in text.split(","):
        device, _, amount = word.rpartition("=")
        if device.strip() not in ("", "cpu"):
            raise Refused(f"--max-memory {word.strip()}: blocks are solved on the cpu; give cpu=8GiB")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", amount.strip())
        if match is None or match[2] not in UNITS or float(match[1]) <= 0:
            raise Refused(
                f"--max-memory {text}: give a size with its unit ({', '.join(filter(None, UNITS))}), such as cpu=8GiB"
            )
        limit = int(float(match[1]) * UNITS[match[2]])
    return limit


def fitted(plan: Plan, limit: int) -> Plan:
    """The plan with as many tokens at once as fit within ``limit`` bytes of resident memory.

    Where one sequence at a time is too much, the plan gets a problem that names the largest item. Smaller microbatches
    change the last bits of results: sums are taken in another order.
    """
    run = plan.run
    assert run is not None
    tokens = run.tokens
    while peak_of(plan, replace(run, tokens=tokens)) > limit and tokens > run.length:
        tokens //= 2
    tried = replace(run, tokens=tokens)
    needed = peak_of(plan, tried)
    if needed <= limit:
        return plan if tokens == run.tokens else replace(plan, run=tried)
    name, most = largest_of(plan, tried)
    why = (
        f"--max-memory {size(limit)}: about {size(needed)} are needed with one sequence at a time; the largest item"
        f" is {name}, {size(most)}. {_advice(name)}"
    )
    return replace(plan, run=tried, problems=(*plan.problems, why))


def _advice(name: str) -> str:
    if "calibration tokens" in name:
        return "Give fewer --samples or a smaller --length, or --dtype bfloat16"
    if "solve" in name or "observe" in name:
        return "Give a smaller --length, or a pass that trains less"
    return "It does not depend on the calibration: allow more"
