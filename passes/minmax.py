"""Rounding to nearest, and minimum-maximum ranges: the plainest way to a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiler.scheme import LinearScheme
from ..compiler.view import BlockView
from ..runtime.formats import BESIDE, format_of
from ..runtime.quantize import quantize
from ..runtime.quantized import QuantizedLinear
from .weight_scale import weight_grid


def rounded_weight(
    view: BlockView, name: str, scheme: LinearScheme, *, grid: tuple[Tensor, Tensor | None] | None = None,
    input_scale: Tensor | None = None, input_offset: Tensor | None = None,
) -> QuantizedLinear:  # fmt: skip
    """Round a weight to nearest on a grid of scale and offset, by default its whole range in the server's dtype."""
    weight = view.weight(name)
    assert scheme.weight is not None
    scale, offset = grid or weight_grid(weight, scheme.weight, scale_dtype(view, name, scheme))
    return QuantizedLinear(
        weight=quantize(weight, scale, scheme.weight.bits, offset), scale=scale, offset=offset, bias=view.bias(name),
        input_scale=input_scale, input_offset=input_offset,
        left=view.tensors.get(f"{name}.left_trans"), right=view.tensors.get(f"{name}.right_trans"),
        online=view.online.get(name), clip=clip_ratio(view, name), beside=floats_beside(view, name),
    )  # fmt: skip


def floats_beside(view: BlockView, name: str) -> dict[str, Tensor]:
    """The tensors of a branch beside a linear, by leaf; nothing where it has none."""
    leaves = (leaf for kind in BESIDE.values() for leaf in kind.leaves)
    return {leaf: view.tensors[f"{name}.{leaf}"] for leaf in leaves if f"{name}.{leaf}" in view.tensors}


def clip_ratio(view: BlockView, name: str) -> float:
    """The clip ratio that was learned with the rotation before a linear; 1 where none was."""
    learned = view.tensors.get(f"{name}.clip_ratio")
    return 1.0 if learned is None else float(learned)


def scale_dtype(view: BlockView, name: str, scheme: LinearScheme) -> torch.dtype:
    """The dtype in which the server holds the weight scales of a linear."""
    assert scheme.weight is not None
    stored = view.formats.get(name)
    if stored is not None:
        return stored.scale_dtype(view.export_dtype)
    rotated = f"{name}.left_trans" in view.tensors and name not in view.online
    act_bits = scheme.act.bits if scheme.act else None
    return format_of(scheme.weight.bits, act_bits, scheme.scope, rotated).scale_dtype(view.export_dtype)
