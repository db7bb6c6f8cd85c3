"""The linear formats of the ascendv1 layout, by type string and by what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .linear import IntegerLinear
from .w4a4 import W4A4Dynamic, W4A4FlatQuantDynamic
from .w4a8 import W4A8Dynamic
from .w8a8 import W8A8, W8A8Dynamic
from .weight_only import W4A16, W8A16

FORMATS: Mapping[str, type[IntegerLinear]] = MappingProxyType(
    {
        format.type: format
        for format in (W8A8, W8A8Dynamic, W8A16, W4A4Dynamic, W4A4FlatQuantDynamic, W4A8Dynamic, W4A16)
    }
)
"""Type string to module class."""


def format_of(weight_bits: int, act_bits: int | None, static: bool, rotated: bool) -> type[IntegerLinear]:
    """The format of a quantized linear (``act_bits`` None: float activation), or ValueError."""
    for format in FORMATS.values():
        if (format.weight_bits, format.act_bits, format.static, format.rotated) == (
            weight_bits,
            act_bits,
            static,
            rotated,
        ):
            return format
    held = f"int{weight_bits} weights, {'float' if act_bits is None else f'int{act_bits}'} activations"
    detail = (", static" if static else "") + (", online rotation" if rotated else "")
    raise ValueError(f"no linear format holds {held}{detail}: there are {', '.join(FORMATS)}")
