"""Presets: names of lists of passes. They expand visibly; a plan never holds a preset."""

from __future__ import annotations

from typing import Literal

from ..compiler.contract import Pass
from .adapt_residual import AdaptResidual
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
    rotation = RotateResidual(block_size=block_size, export_extra_info=export_extra_info)
    passes = (FuseNorms(), rotation, RotateHeads(block_size=block_size))
    return passes + _online(online, max_tp_size, down_proj_online_layers)


def adapt_rotation(
    steps: int = 20,
    quant_dtype: Literal["int4", "int8"] = "int4",
    layer_type: tuple[str, ...] = (),
    max_samples: int = 2048,
    block_size: int = -1,
    online: bool = False,
    max_tp_size: int | None = None,
    down_proj_online_layers: tuple[int, ...] | None = None,
) -> tuple[Pass, ...]:
    """``quarot`` with a rotation of the residual stream that is turned towards the model's own values.

    Both stages of the recipe's ``adapt_rotation``: what the first one looks for is found in a run of its own.
    """
    rotation = AdaptResidual(
        block_size=block_size,
        steps=steps,
        quant_dtype=quant_dtype,
        layer_type=layer_type,
        max_samples=max_samples,
    )
    passes = (FuseNorms(), rotation, RotateHeads(block_size=block_size))
    return passes + _online(online, max_tp_size, down_proj_online_layers)


def _online(online: bool, max_tp_size: int | None, layers: tuple[int, ...] | None) -> tuple[Pass, ...]:
    if not online:
        return ()
    if max_tp_size is None and layers is None:
        return (OnlineRotation(),)
    size = 4 if max_tp_size is None else max_tp_size
    return (QuarotOnline(max_tp_size=size, down_proj_online_layers=layers or ()),)
