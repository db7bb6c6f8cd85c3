"""The linear formats of the ascendv1 layout, by type string and by what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .beside import Beside
from .linear import IntegerLinear
from .low_rank import LowRankBranch
from .outlier_channels import OutlierChannels
from .outlier_weights import OutlierWeights
from .w4a4 import W4A4Dynamic, W4A4FlatQuantDynamic
from .w4a8 import W4A8Dynamic
from .w8a8 import W8A8, W8A8Dynamic, W8A8DynamicTensor
from .w8a8_mix import W8A8Mix
from .weight_only import W4A16, W8A16

FORMATS: Mapping[str, type[IntegerLinear]] = MappingProxyType(
    {
        format.type: format
        for format in (
            W8A8,
            W8A8Dynamic,
            W8A8DynamicTensor,
            W8A8Mix,
            W8A16,
            W4A4Dynamic,
            W4A4FlatQuantDynamic,
            W4A8Dynamic,
            W4A16,
        )
    }
)
"""Type string to module class."""
BESIDE: Mapping[str, type[Beside]] = MappingProxyType(
    {kind.suffix: kind for kind in (LowRankBranch, OutlierChannels, OutlierWeights)}
)
"""End of a type string to what stands in float beside the integers."""


def type_of(stored: str) -> tuple[type[IntegerLinear] | None, type[Beside] | None]:
    """The format and the float part of a linear that is stored as such a type; None where there is no such one."""
    for suffix, kind in BESIDE.items():
        if stored.endswith(suffix):
            return FORMATS.get(stored.removesuffix(suffix)), kind
    return FORMATS.get(stored), None


def format_of(
    weight_bits: int, act_bits: int | None, act_scope: str | None, rotated: bool
) -> type[IntegerLinear]:
    """The format of a quantized linear (``act_bits`` and ``act_scope`` None: float activation), or ValueError."""
    for format in FORMATS.values():
        wanted = (weight_bits, act_bits, act_scope, rotated)
        if (format.weight_bits, format.act_bits, format.act_scope, format.rotated) == wanted:
            return format
    held = f"int{weight_bits} weights, {'float' if act_bits is None else f'int{act_bits}'} activations"
    detail = (f", per {act_scope}" if act_scope else "") + (", online rotation" if rotated else "")
    raise ValueError(f"no linear format holds {held}{detail}: there are {', '.join(FORMATS)}")
