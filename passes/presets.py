"""Presets: names of lists of passes. They expand visibly; a plan never holds a preset."""

from __future__ import annotations

from ..compiler.contract import Pass
from .fuse_norms import FuseNorms
from .online_rotation import OnlineRotation
from .rotate_heads import RotateHeads
from .rotate_residual import RotateResidual


def quarot(online: bool = False, block_size: int = -1) -> tuple[Pass, ...]:
    """QuaRot (arXiv 2404.00456): norm fusion and rotations absorbed by weights; ``online`` adds run-time ones."""
    passes: tuple[Pass, ...] = (
        FuseNorms(), RotateResidual(block_size=block_size), RotateHeads(block_size=block_size),
    )  # fmt: skip
    return (*passes, OnlineRotation()) if online else passes
