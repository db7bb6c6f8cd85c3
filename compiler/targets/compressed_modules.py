"""The linears of a checkpoint of compressed-tensors as modules on meta, found without the library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...runtime.linear import IntegerLinear
from ..errors import Refused
from ..safetensors_io import read_tensors
from ..scheme import Int, LinearScheme
from ..shards import Shards
from .compressed_tensors import COMPRESSED_TENSORS

SCALE, SHAPE, PACKED = "weight_scale", "weight_shape", "weight_packed"


def modules_of_block(
    shards: Shards, block: Mapping[str, Any], dtype: torch.dtype
) -> tuple[dict[str, IntegerLinear], list[str]]:
    """Prefix on disk to the linear that a ``quantization_config`` of qc's writing calls for, and what has none.

    Args:
        shards: The tensors.
        block: The ``quantization_config``.
        dtype: That of the floats.

    Raises:
        Refused: Its groups are none, or one has no targets that can be read.
    """
    modules: dict[str, IntegerLinear] = {}
    wrong: list[str] = []
    groups = _groups(block)
    prefixes = {name.rpartition(".")[0] for name in shards.entries if name.endswith((SCALE, PACKED, SHAPE))}
    for prefix in sorted(prefixes):
        found = [group for group in groups if _is_meant(prefix, group["targets"])]
        scheme = _scheme(found[0]) if found else None
        format = COMPRESSED_TENSORS.format_of(scheme, False) if scheme is not None else None
        if scheme is None or scheme.weight is None or format is None:
            why = (
                f"is {scheme}, which qc does not write" if found else "is in no group of quantization_config"
            )
            wrong.append(f"{prefix} has integers and {why}")
            continue
        size = _size(shards, prefix)
        if size is None:
            wrong.append(f"{prefix} has no weight of two axes, and {SCALE} without one scales nothing")
            continue
        try:
            modules[prefix] = format(
                size[1], size[0], bias=f"{prefix}.bias" in shards.entries, dtype=dtype,
                group_size=scheme.weight.group, device="meta",
            )  # fmt: skip
        except ValueError as error:
            wrong.append(f"{prefix}: {error}")
    return modules, wrong


def _groups(block: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = block.get("config_groups")
    found: list[Mapping[str, Any]] = list(groups.values()) if isinstance(groups, Mapping) else [{}]
    try:
        for target in (target for group in found for target in group["targets"]):
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
    except (TypeError, KeyError, AttributeError, re.error) as error:
        raise Refused(
            "quantization_config: config_groups must map names to groups with a list of targets, as qc compile writes"
            f" it ({type(error).__name__}: {error})"
        ) from error
    return found


def _is_meant(prefix: str, targets: Sequence[str]) -> bool:
    """Whether a target means a linear; the name on disk may have a part in front that the model's has not."""
    for target in targets:
        if target.startswith("re:"):
            if re.match(target.removeprefix("re:"), prefix):
                return True
        elif f".{prefix}".endswith(f".{target}") or f".{target}".endswith(f".{prefix}"):
            return True
    return False


def _scheme(group: Mapping[str, Any]) -> LinearScheme | None:
    """The scheme of a group; None where it is none of integers."""
    weight, act = (_int(group.get(side)) for side in ("weights", "input_activations"))
    return None if weight is None else LinearScheme(weight, act)


def _int(args: Any) -> Int | None:
    if not isinstance(args, Mapping) or args.get("type") != "int":
        return None
    bits, per, group = args.get("num_bits"), args.get("strategy", "channel"), args.get("group_size") or 0
    if not isinstance(bits, int) or not isinstance(group, int):
        return None
    return Int(bits, per, group=group, symmetric=bool(args.get("symmetric", True)))


def _size(shards: Shards, prefix: str) -> tuple[int, int] | None:
    """[out, in] of a linear: that of its integers, or what stands beside packed ones."""
    whole, shape = shards.entries.get(f"{prefix}.weight"), f"{prefix}.{SHAPE}"
    if whole is not None:
        return (whole.shape[0], whole.shape[1]) if len(whole.shape) == 2 else None
    if shape not in shards.entries or shards.entries[shape].shape != (2,):
        return None
    out, width = read_tensors(shards.file[shape], {shape: shards.entries[shape]})[shape].tolist()
    return out, width
