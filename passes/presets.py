"""Presets: names of lists of passes. They expand visibly; a plan never holds a preset."""

from __future__ import annotations

from ..compiler.contract import Pass
from .fuse_norms import FuseNorms
from .online_rotation import OnlineRotation
from .quarot_online import QuarotOnline
from .rotate_heads import RotateHeads
from .rotate_residual import RotateResidual


def quarot(
    online: bool = False,
    block_size: int = -1,
    max_tp_size: int | None = None,
    down_proj_online_layers: tuple[int, ...] | None = None,
    export_extra_info: bool = True,
) -> tuple[Pass, ...]:
    """QuaRot (arXiv 2404.00456): norm fusion and rotations absorbed by weights; ``online`` adds run-time ones.

    Online rotations are those that servers load (``online_rotation``). With ``max_tp_size`` or
    ``down_proj_online_layers`` they are those of the reference tool (``quarot_online``). ``export_extra_info``
    writes the rotation of the residual stream for draft models.
    """
    passes: tuple[Pass, ...] = (
        FuseNorms(), RotateResidual(block_size=block_size, export_extra_info=export_extra_info),
        RotateHeads(block_size=block_size),
    )  # fmt: skip
    if not online:
        return passes
    if max_tp_size is None and down_proj_online_layers is None:
        return (*passes, OnlineRotation())
    size = 4 if max_tp_size is None else max_tp_size
    return (*passes, QuarotOnline(max_tp_size=size, down_proj_online_layers=down_proj_online_layers or ()))
