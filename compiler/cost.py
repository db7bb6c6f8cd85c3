"""Cost of a plan: bits, bytes, sweeps and memory, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .memory import peak_of
from .plan import Plan
from .scheme import LinearScheme
from .targets.served import LinearSite, sites_of

GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """What a plan costs. Bits count scales, offsets and what stands in float beside integers.

    An int4 is a byte on disk and half a byte on the device."""

    bits_per_weight: float
    """Average over the linears of all blocks."""
    disk_bytes: int
    device_bytes: int
    sweeps: int
    """Times the checkpoint is streamed."""
    peak_bytes: int | None
    """Estimated peak resident memory of the compile; None where nobody said how calibration runs."""
    tp_sizes: tuple[int, ...]
    """Tensor-parallel ranks for which the result loads, as the target says; empty where it does not say."""
    schemes: tuple[tuple[str, int], ...]
    """Scheme and number of block linears, in order of first use."""

    def rows(self) -> list[tuple[str, str]]:
        """Labels and values as the plan prints them."""
        rows = [
            ("linears", ", ".join(f"{count} {name}" for name, count in self.schemes)),
            ("bits per weight", f"{self.bits_per_weight:.2f} (block linears, scales counted)"),
            ("on disk", size(self.disk_bytes)),
            ("on the device", size(self.device_bytes)),
            ("sweeps", str(self.sweeps)),
        ]
        if self.peak_bytes is not None:
            rows.append(("peak memory", f"about {size(self.peak_bytes)}"))
        if self.tp_sizes:
            rows.append(("tensor parallel", ", ".join(map(str, self.tp_sizes))))
        return rows

    def numbers(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "bits_per_weight": round(self.bits_per_weight, 4), "disk_bytes": self.disk_bytes,
            "device_bytes": self.device_bytes, "sweeps": self.sweeps, "peak_bytes": self.peak_bytes,
            "tp_sizes": list(self.tp_sizes), "schemes": dict(self.schemes),
        }  # fmt: skip


def stored_bits(out: int, width: int, scheme: LinearScheme) -> int:
    """Bits of a weight [out, width] on the device, with 32 per scale and per offset; float is 16 per weight."""
    if scheme.weight is None:
        return 16 * out * width
    groups = width // scheme.weight.group if scheme.weight.group else 1
    return scheme.weight.bits * out * width + 32 * out * groups * (1 if scheme.weight.symmetric else 2)


def linear_bits(site: LinearSite, dtype: torch.dtype) -> int:
    """Bits of a linear in a model of ``dtype``: those of its weight, and of what stands in float beside integers."""
    bits = stored_bits(site.out_features, site.in_features, site.scheme)
    if site.beside is None:
        return bits
    stored = site.beside.tensors(site.in_features, site.out_features, dtype).values()
    return bits + sum(8 * dtype.itemsize * prod(shape) for dtype, shape in stored)


def size(count: int) -> str:
    """Bytes for people."""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**10:.0f} KiB"


def sweeps_of(plan: Plan) -> int:
    """How often the weights are read: to solve and write, and before that where a pass looks at the whole model."""
    rewrites = [(step.what, rewrite) for step in plan.steps for rewrite in step.answer.rewrites]
    return (1 if rewrites else 0) + any(what.surveys(rewrite) for what, rewrite in rewrites)


def cost_of(plan: Plan, *, peak: bool = True) -> Cost:
    """Add up the planned tensors.

    ``peak``: whether to estimate peak memory. It starts from what this process holds now, so it is the one number
    here that varies between runs.
    """
    bits, weights = 0, 0
    packed = 0  # bytes that int4 weights save on the device
    schemes: dict[str, int] = {}
    for site in sites_of(plan):
        count = site.out_features * site.in_features
        bits += linear_bits(site, plan.dtype)
        format = plan.formats.get(site.name)
        packed += count // 2 if format is not None and format.weight_bits == 4 and not format.packed else 0
        weights += count
        name = str(site.scheme) if site.scheme.quantized else "float"
        schemes[name] = schemes.get(name, 0) + 1
    try:
        disk = plan.layout.nbytes
    except Exception:
        if not plan.problems:
            raise
        disk = 0  # a plan with problems has no layout
    return Cost(
        bits_per_weight=bits / max(weights, 1),
        disk_bytes=disk,
        device_bytes=max(disk - packed, 0),
        sweeps=sweeps_of(plan),
        peak_bytes=peak_of(plan, plan.run) if peak and plan.run is not None else None,
        tp_sizes=plan.target.tp_sizes_of(plan),
        schemes=tuple(schemes.items()),
    )
