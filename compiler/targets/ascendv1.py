"""The ascendv1 layout: which tensors a linear becomes, and the description file that says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...runtime.formats import format_of as runtime_format
from ...runtime.linear import IntegerLinear
from ...runtime.w4a4 import W4A4FlatQuantDynamic
from ...runtime.w4a8 import W4A8Dynamic
from ..errors import Refused
from ..safetensors_io import TensorSpec
from ..scheme import LinearScheme
from .served import LinearSite
from .target import DiskNames, Layout

DESCRIPTION = "quant_model_description.json"
FLOAT_TYPE = "FLOAT"
VERSION = "1.0.0"
PRIORITY = (
    FLOAT_TYPE,
    "W8A16",
    "W4A16",
    "W8A8_DYNAMIC",
    "W8A8_MIX",
    "W8A8",
    "W4A4_DYNAMIC",
    "W4A4_FLATQUANT_DYNAMIC",
)
"""Type strings in ascending order: the last one present names the model. ``W4A8_DYNAMIC`` never does, as in the
reference: a mixture with such experts has the name of its other linears."""


def format_of(scheme: LinearScheme, rotated: bool) -> type[IntegerLinear] | None:
    """The format that holds a scheme, None where the layout has none (or the scheme is float)."""
    weight, act = scheme.weight, scheme.act
    if weight is None or not weight.symmetric or weight.per not in ("channel", "group"):
        return None
    if act is not None and act.per not in ("token", "tensor", "mix"):
        return None
    try:
        found = runtime_format(weight.bits, None if act is None else act.bits, scheme.scope, rotated)
    except ValueError:
        return None
    return found if found.grouped or not weight.group else None


def linear_tensors(
    format: type[IntegerLinear], site: LinearSite, dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """Leaf name to dtype and shape of every tensor of one quantized linear, in a model of ``dtype``."""
    group = site.scheme.weight.group if site.scheme.weight else 0
    options: dict[str, Any] = {"bias": site.bias, "dtype": dtype, "group_size": group, "device": "meta"}
    if issubclass(format, W4A4FlatQuantDynamic):
        options["blocks"] = site.blocks
    if issubclass(format, W4A8Dynamic):
        options["row_parallel"] = site.row_parallel
    module = format(site.in_features, site.out_features, **options)
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in module.state_dict().items()}


def layout(
    parameters: Mapping[str, TensorSpec],
    sites: Sequence[LinearSite],
    dtype: torch.dtype,
    names: DiskNames,
    choose: Callable[[LinearScheme, bool], type[IntegerLinear] | None],
) -> Layout:
    """The tensors of an export: see ``Target.layout``; ``choose`` gives the format of a scheme."""
    specs: dict[str, TensorSpec] = {}
    types: dict[str, str] = {}
    prefixes: dict[str, str] = {}
    linears = {site.name: site for site in sites}
    for name, spec in parameters.items():
        module, _, leaf = name.rpartition(".")
        site = linears.get(module)
        format = choose(site.scheme, site.rotated) if site else None
        if site is None or format is None:
            for full, stored in names.disk_tensors(name, spec).items():
                specs[full], types[full] = stored, FLOAT_TYPE
        elif leaf == "weight":
            own = names.disk_name(name)
            if not names.separable(name):
                raise Refused(
                    f"{module}: its weight shares a tensor on disk with others; exclude it from quantization"
                )
            prefixes[module] = own.removesuffix(".weight")
            for part, stored in linear_tensors(format, site, dtype).items():
                full = f"{prefixes[module]}.{part}"
                specs[full] = stored
                types[full] = FLOAT_TYPE if part == "bias" else format.type
    groups = [s.scheme.weight.group for s in sites if s.scheme.weight and s.scheme.weight.group]
    return Layout(specs, types, prefixes, groups[-1] if groups else 0)


def description(layout: Layout) -> dict[str, Any]:
    """``quant_model_description.json``: a type for every tensor in the order of writing, then global keys."""
    present = set(layout.types.values())
    return {
        **layout.types,
        "version": VERSION,
        "model_quant_type": max(present & set(PRIORITY), key=PRIORITY.index, default=FLOAT_TYPE),
        "group_size": layout.group_size,
        "metadata": {},
        "optional": {},
    }
