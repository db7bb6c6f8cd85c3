"""Numbers that vllm-ascend takes and that cannot be what they stand for (A9), sizes of its ops (A10), caches (A11)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from ..capture_sizes import Sizes
from .releases import Release
from .stored import Stored
from .target import Finding
from .vllm_layers import Served
from .vllm_rules import LONGEST_SIDE, SAFE_FACTOR
from .vllm_tensors import ATTENTION, CACHE

SYMMETRIC = ("W8A8_DYNAMIC", "W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC", "W4A8_DYNAMIC", "W8A8_MIX")
"""Types whose weight offset the server never reads."""


def values(files: Stored, server: Served, names: Mapping[str, str], deep: bool) -> Iterator[Finding]:
    """A9: what stands in the tensors of integer linears."""
    for disk, name in names.items():
        module, _, leaf = name.rpartition(".")
        kind = server.kinds.get(module)
        if kind is None or kind == "FLOAT" or leaf not in server.parameters[module]:
            continue
        if leaf == "weight" and not (deep and kind in ("W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC")):
            continue
        parameter, entry = server.parameters[module][leaf], files.entries[disk]
        if leaf in ("quant_bias", "scale_bias", "bias") or entry.shape != parameter.shape or not entry.nbytes:
            continue  # told by its shape
        tensor = files.read(disk)
        wide = tensor.float() if entry.dtype.is_floating_point else tensor  # float8 has no comparisons
        why = _wrong(leaf, kind, wide, parameter.dtype)
        if why:
            yield Finding("ruins", "A9", disk, why)


def _wrong(leaf: str, kind: str, tensor: Tensor, wanted: torch.dtype) -> str:
    """What of the numbers of one tensor the server takes and computes nonsense with; empty where nothing is."""
    if leaf == "weight":
        if tensor.dtype != torch.int8:
            return ""  # told by its dtype
        least, most = int(tensor.min()), int(tensor.max())
        return (
            ""
            if least >= -8 and most <= 7
            else f"int4 from {least} to {most}: packing keeps the lowest four bits"
        )
    if leaf in ("deq_scale", "input_scale", "weight_scale", "weight_scale_second"):
        if tensor.dtype == torch.int64:
            tensor = tensor.to(torch.int32).view(torch.float32)
        elif wanted == torch.int64:
            return ""  # told by its dtype
        return _not_positive(tensor.to(wanted) if wanted.is_floating_point else tensor)
    if leaf == "weight_offset" and kind in SYMMETRIC:
        return "the server reads no offset of such weights, and this one is not zero" if tensor.any() else ""
    if leaf == "clip_ratio":
        fine = bool(((tensor > 0) & (tensor <= 1)).all())
        return (
            "" if fine else f"a clip ratio of {float(tensor.reshape(-1)[0]):g}; it is above 0 and at most 1"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        return "some numbers are not finite"
    return ""


def _not_positive(scales: Tensor) -> str:
    bad = int((~(scales > 0) | ~torch.isfinite(scales)).sum())
    return f"{bad} of {scales.numel()} scales are no positive numbers" if bad else ""


def sizes_of_ops(sizes: Sizes, server: Served) -> Iterator[Finding]:
    """A10: sides of operands, packs of int4, factors of FlatQuant."""
    for name, kind in server.kinds.items():
        if kind == "FLOAT":
            continue
        parameters = server.parameters[name]
        shape = sizes.linears.get(name)
        out, width = (shape.out, shape.width) if shape else parameters["weight"].shape
        if max(out, width) > LONGEST_SIDE:
            yield Finding(
                "refuses", "A10", name, f"{max(out, width)} channels; its op takes at most {LONGEST_SIDE}"
            )
        if kind.startswith("W4A4") and (out % 8 or width % 8):
            yield Finding(
                "refuses", "A10", name, f"int4 goes in packs of 8, and it has {width} in and {out} out"
            )
        if "right_trans" in parameters and parameters["right_trans"].shape[0] > SAFE_FACTOR:
            side = parameters["right_trans"].shape[0]
            yield Finding(
                "warns", "A10", name, f"a factor of {side}; CANN before 8.5 takes at most {SAFE_FACTOR}"
            )


def grids(
    files: Stored, sizes: Sizes, release: Release, names: Mapping[str, str], described: Mapping[str, object]
) -> Iterator[Finding]:
    """A11: int8 caches and attentions."""
    config = (
        files.config.get("text_config")
        if isinstance(files.config.get("text_config"), Mapping)
        else files.config
    )
    assert isinstance(config, Mapping)
    switched = described.get("kv_cache_type") == "C8"
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
    per_head = config.get("head_dim") or (
        config.get("hidden_size", 0) // max(1, config.get("num_attention_heads") or 1)
    )
    warned = False
    for disk, name in names.items():
        entry = files.entries[disk]
        if ATTENTION.fullmatch(name) and not (described.get("fa_quant_type") and "kv_lora_rank" in config):
            yield Finding(
                "refuses",
                "A11",
                disk,
                "int8 attentions are served over a latent (MLA) alone: there is no such parameter",
            )
        if not CACHE.fullmatch(name):
            continue
        if not switched:
            why = "the description does not say kv_cache_type C8: there is no such parameter"
            yield Finding("refuses", "A11", disk, why)
            continue
        if (count := prod(entry.shape)) != heads * per_head:
            yield Finding(
                "refuses",
                "A11",
                disk,
                f"{count} numbers; the first step views them as {heads} heads of {per_head}",
            )
        elif per_head % 32:
            yield Finding(
                "refuses", "A11", disk, f"heads of {per_head} channels; its cache needs a multiple of 32"
            )
        elif name.endswith("offset") and not release.reads_offsets and bool(files.read(disk).any()):
            why = "it is added when the cache is written and not taken off when it is read"
            yield Finding("ruins", "A11", disk, why)
        elif name.endswith("scale") and (bad := _not_positive(files.read(disk).float())):
            yield Finding("ruins", "A9", disk, bad)
        if release.cached and sizes.architecture not in release.cached and not warned:
            warned = True
            yield Finding(
                "warns", "A11", disk,
                f"vllm-ascend {release.version} loads scales of caches itself for {', '.join(sorted(release.cached))}"
                " alone; what vLLM does with others was not read",
            )  # fmt: skip
    if switched:
        yield from _without_scales(sizes, names, described)


def _without_scales(
    sizes: Sizes, names: Mapping[str, str], described: Mapping[str, object]
) -> Iterator[Finding]:
    """Caches of int8, one for every key of the description with this ending, of which a scale is in no file.

    The server starts from one number, and views it as one per channel in its first step. Offsets start from zero.
    """
    ending, held = ".k_proj.kv_cache_scale", set(names.values())
    for attention in (key.removesuffix(ending) for key in described if key.endswith(ending)):
        for one in ("k", "v"):
            disk = f"{attention}.{one}_proj.kv_cache_scale"
            if sizes.name_of(disk) not in held:
                why = "its cache is int8 and it is in no file: the first step has one number for all heads"
                yield Finding("refuses", "A11", disk, why)
