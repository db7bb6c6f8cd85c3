"""A limit on memory: linears and tokens in pieces until the estimate fits, or a refusal that names the largest item."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from .cost import size
from .device import CPU
from .errors import Refused
from .memory import Run, device_peak_of, largest_of, largest_there, peak_of
from .plan import Plan

UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def limits_of(text: str, device: torch.device = CPU) -> dict[torch.device, int]:
    """Bytes by device of ``cpu=8GiB,cuda:0=4GiB``; a size without a device is that of the host.

    Raises:
        Refused: A device on which nothing runs, one that is given twice, a size that is none.
    """
    limits: dict[torch.device, int] = {}
    for word in text.split(","):
        name, _, amount = (one.strip() for one in word.rpartition("="))
        names = {"": CPU, "cpu": CPU, str(device): device, device.type: device}
        if name not in names:
            raise Refused(
                f"--max-memory {word.strip()}: no block runs on {name}; blocks run on {device}"
                + (f": give --device {name} too, or cpu=8GiB" if device == CPU else "")
            )
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", amount)
        if match is None or match[2] not in UNITS or float(match[1]) <= 0:
            raise Refused(
                f"--max-memory {text}: give a size with its unit ({', '.join(filter(None, UNITS))}), such as cpu=8GiB"
            )
        if names[name] in limits:
            raise Refused(f"--max-memory {text}: it says twice how much of {names[name]} may be used")
        limits[names[name]] = int(float(match[1]) * UNITS[match[2]])
    return limits


def fitted(plan: Plan, limits: Mapping[torch.device, int]) -> Plan:
    """The plan cut into pieces until it fits within the limits: resident memory, and memory of the device.

    First a training keeps how weights came onto their grids for one linear at a time, which changes no number; then
    fewer tokens run at once, which changes the last bits: sums are taken in another order. Where one sequence at a time
    is too much, the plan gets a problem per device that names the largest item.
    """
    run = plan.run
    assert run is not None
    over, again = _over(plan, run, limits), replace(run, recompute=True)
    helps = any(_peak(plan, again, device) < most for device, most in over.items())
    tried = again if helps else run
    while _over(plan, tried, limits) and tried.tokens > run.length:
        tried = replace(tried, tokens=tried.tokens // 2)
    over = _over(plan, tried, limits)
    if not over:
        return plan if tried == run else replace(plan, run=tried, notes=(*plan.notes, _told(run, tried)))
    problems = []
    for device, needed in over.items():
        name, most = (largest_of if device == CPU else largest_there)(plan, tried)
        where = "" if device == CPU else f"{device}="
        problems.append(
            f"--max-memory {where}{size(limits[device])}: about {size(needed)} are needed with one sequence at a time;"
            f" the largest item is {name}, {size(most)}. {_advice(name)}"
        )
    return replace(plan, run=tried, problems=(*plan.problems, *problems))


def _told(run: Run, tried: Run) -> str:
    """What is done to keep to the limits."""
    done = ["trainings make their weights again in the backward pass"] if tried.recompute else []
    done += [f"{tried.microbatch} tokens run at once"] if tried.microbatch != run.microbatch else []
    return f"--max-memory: {' and '.join(done)}"


def _over(plan: Plan, run: Run, limits: Mapping[torch.device, int]) -> dict[torch.device, int]:
    """The estimates that are above their limits."""
    needed = {device: _peak(plan, run, device) for device in limits}
    return {device: most for device, most in needed.items() if most > limits[device]}


def _peak(plan: Plan, run: Run, device: torch.device) -> int:
    return peak_of(plan, run) if device == CPU else device_peak_of(plan, run)


def _advice(name: str) -> str:
    if "calibration tokens" in name:
        return "Give fewer --samples or a smaller --length, or --dtype bfloat16"
    if "solve" in name or "observe" in name:
        return "Give a smaller --length, or a pass that trains less"
    return "It does not depend on the calibration: allow more"
