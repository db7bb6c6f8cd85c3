"""Resident memory of this process: how much there is, how much there was at most, and giving back what is free."""

from __future__ import annotations

import ctypes
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes that are resident now (VmRSS); where the system does not say, the most there were."""
    return _status("VmRSS") or peak()


def peak() -> int:
    """The most bytes that were resident so far (VmHWM).

    Where there is no /proc, what getrusage says: bytes on macOS, kibibytes elsewhere. On Linux that number would
    be inherited from the process that started this one.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    glibc keeps freed tensors of up to 32 MiB in its heaps, between those that live on: without this a process
    grows from block to block although nothing of a block is kept.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
