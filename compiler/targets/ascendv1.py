"""The ascendv1 layout: which tensors a linear becomes, and the description file that says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...runtime.divided import INNER, LEAF
from ...runtime.formats import format_of as runtime_format
from ...runtime.formats import type_of
from ...runtime.linear import ROTATIONS, IntegerLinear
from ...runtime.w4a4 import W4A4FlatQuantDynamic
from ...runtime.w4a8 import W4A8Dynamic
from ..description import DESCRIPTION as DESCRIPTION
from ..description import TURNS
from ..errors import Refused
from ..safetensors_io import TensorSpec
from ..scheme import LinearScheme
from .served import AttentionGrid, LinearSite, ModelFacts
from .target import DiskNames, Layout

FLOAT_TYPE = "FLOAT"
STEM = "quant_model_weights"
WEIGHTS_INDEX = f"{STEM}.safetensors.index.json"
VERSION = "1.0.0"
ROTATION_FILE = "optional/quarot.safetensors"
GLOBAL_ROTATION = {"quarot": {"rotation_map": {"global_rotation": ROTATION_FILE}}}
"""Where a draft model finds the rotation of the hidden state that it shares."""
SPARSE_TYPE = "W16A16S"
"""Float tensors of a linear that was pruned."""
PRIORITY = (
    FLOAT_TYPE,
    SPARSE_TYPE,
    "W8A16",
    "W4A16",
    "W8A8_DYNAMIC",
    "W8A8_DYNAMIC_TENSOR",
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
    if weight is None or weight.per not in ("channel", "group", "tensor"):
        return None
    try:
        found = runtime_format(weight.bits, None if act is None else act.bits, scheme.scope, rotated)
    except ValueError:
        return None
    held = (found.grouped or not weight.group) and (found.offsets or weight.symmetric)
    return found if held else None


def linear_tensors(
    format: type[IntegerLinear], site: LinearSite, dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """Leaf name to dtype and shape of every tensor of one quantized linear, in a model of ``dtype``."""
    group = site.scheme.weight.group if site.scheme.weight else 0
    options: dict[str, Any] = {"bias": site.bias, "dtype": dtype, "group_size": group, "device": "meta"}
    if site.online is not None:
        options["rotation"] = (site.online.layout, site.online.left, site.online.right)
    if site.beside is not None:
        options["beside"] = site.beside
    if issubclass(format, W4A4FlatQuantDynamic):
        options["blocks"] = site.blocks
    if issubclass(format, W4A8Dynamic):
        options["row_parallel"] = site.row_parallel
    module = format(site.in_features, site.out_features, **options)
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in module.state_dict().items()}


def layout(
    parameters: Mapping[str, TensorSpec],
    sites: Sequence[LinearSite],
    model: ModelFacts,
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
            kind = FLOAT_TYPE if site is None or site.stored_as is None else site.stored_as
            for full, stored in names.disk_tensors(name, spec).items():
                specs[full], types[full] = stored, kind
        elif leaf == "weight":
            own = names.disk_name(name)
            if not names.separable(name):
                raise Refused(
                    f"{module}: its weight shares a tensor on disk with others; exclude it from quantization"
                )
            prefixes[module] = own.removesuffix(".weight")
            if site.divided:
                division = f"{prefixes[module]}.{LEAF}"
                specs[division] = TensorSpec(model.dtype, (site.in_features,))
                types[division] = FLOAT_TYPE
                prefixes[module] += f".{INNER}"
            for part, stored in linear_tensors(format, site, model.dtype).items():
                full = f"{prefixes[module]}.{part}"
                specs[full] = stored
                if part not in TURNS:  # the reference tool names no types of them
                    floats = site.beside.leaves if site.beside is not None else ()
                    own_type = format.type + (site.beside.suffix if site.beside is not None else "")
                    types[full] = FLOAT_TYPE if part in ("bias", *floats) else own_type
    groups = [s.scheme.weight.group for s in sites if s.scheme.weight and s.scheme.weight.group]
    stubs: dict[str, str] = {}
    for grid in model.grids:
        prefix = (
            prefixes.get(grid.module)
            or names.disk_name(f"{grid.attention}.x").removesuffix("x") + (grid.module.rpartition(".")[2])
        )
        for leaf, spec in grid_tensors(grid).items():
            full = stubs[f"{grid.module}.{leaf}"] = f"{prefix}.{leaf}"
            specs[full], types[full] = spec, "C8" if grid.stub.kind == "cache" else "FAQuant"
    return Layout(
        specs, types, prefixes, groups[-1] if groups else 0, stubs,
        facts=_facts(model.grids, names), metadata=_metadata(sites),
        optional=GLOBAL_ROTATION if model.global_rotation else {},
    )  # fmt: skip


def config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of an export: it names the index of the weights, which transformers would not find else."""
    return {**config, "transformers_weights": WEIGHTS_INDEX}


def _metadata(sites: Sequence[LinearSite]) -> dict[str, Any]:
    """What a reader should know of online rotations: which layers have which."""
    turned = [site for site in sites if site.online is not None]
    if not turned:
        return {}
    found: dict[str, Any] = {"max_tp_size": max(s.online.block for s in turned if s.online)}
    for kind in ROTATIONS:
        layers = [site.block for site in turned if site.online is not None and site.online.layout == kind]
        found[f"{kind}_rotation"] = {"layers": layers}
    return {"quarot": found}


def grid_tensors(grid: AttentionGrid) -> dict[str, TensorSpec]:
    """Leaf name to dtype and shape of what is stored of a grid; nothing where it is found while the model runs."""
    scale, offset = grid.stub.leaves
    if grid.stub.kind == "cache":
        size = (grid.heads * grid.head_dim,)
        return {scale: TensorSpec(torch.float32, size), offset: TensorSpec(torch.float32, size)}
    if grid.stub.scope == "token":
        return {}
    size = (grid.heads, 1)
    return {scale: TensorSpec(torch.float32, size), offset: TensorSpec(torch.int8, size)}


def _facts(grids: Sequence[AttentionGrid], names: DiskNames) -> dict[str, Any]:
    """Keys by which a server knows of quantized caches and attentions."""
    found: dict[str, Any] = {}
    if any(grid.stub.kind == "cache" for grid in grids):
        found |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    read: dict[str, dict[str, str]] = {}
    for grid in grids:
        if grid.stub.kind == "fa":
            kind = "INT8_DYNAMIC" if grid.stub.scope == "token" else "INT8"
            read.setdefault(grid.attention, {})["qkv"[grid.stub.operand].upper()] = kind
    if read:
        found["fa_quant_type"] = "FAKQuant"
    for attention, kinds in read.items():
        prefix = names.disk_name(f"{attention}.x").removesuffix(".x")
        found[f"{prefix}.quant_type"] = merged(kinds)
    return found


def merged(kinds: Mapping[str, str]) -> str:
    """Types of Q, K and V in one string: one type alone where all have it, else ``QK_INT8_V_INT8_DYNAMIC``."""
    if len(set(kinds.values())) == 1 and len(kinds) == 3:
        return next(iter(kinds.values()))
    groups: dict[str, str] = {}
    for letter in "QKV":
        if letter in kinds:
            groups[kinds[letter]] = groups.get(kinds[letter], "") + letter
    return "_".join(f"{letters}_{kind}" for kind, letters in groups.items())


def description(layout: Layout) -> dict[str, Any]:
    """``quant_model_description.json``: a type for every tensor in the order of writing, then global keys."""
    present = {getattr(type_of(kind)[0], "type", kind) for kind in layout.types.values()}
    return {
        **layout.types,
        **layout.facts,
        "version": VERSION,
        "model_quant_type": max(present & set(PRIORITY), key=PRIORITY.index, default=FLOAT_TYPE),
        "group_size": layout.group_size,
        "metadata": layout.metadata,
        "optional": layout.optional,
    }
