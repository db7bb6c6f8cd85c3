"""What the CPU can multiply in hardware."""

from __future__ import annotations

import torch


def has_units(*kinds: str) -> bool:
    """Whether a capability of the CPU has one of ``kinds`` in its name: ``vnni``, ``amx_int8``, ``bf16``, ..."""
    there = (name for name, has in torch.cpu.get_capabilities().items() if has)
    return any(kind in name for name in there for kind in kinds)
