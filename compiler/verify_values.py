"""Whether the numbers in the files of an output can be what they stand for: the check ``values`` of ``qc verify``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.linear import IntegerLinear
from ..runtime.w4a8 import W4A8Dynamic, sums, unpack_pairs
from .description import GRIDS
from .safetensors_io import Entry, read_header, read_tensors

ORTHOGONAL = 0.05
"""How far the product of a rotation factor and its transpose may be from one; bfloat16 rounds to 0.004."""
CONDITION = 1e4
"""Largest condition number of a factor that a weight can have been folded by."""


def values_of(
    path: Path, modules: Mapping[str, IntegerLinear], description: Mapping[str, Any], learned: bool
) -> tuple[int, list[str]]:
    """Read every tensor once, and look whether its numbers can be what they stand for.

    Online transforms are orthogonal, unless some of them are ``learned``: then they can be inverted.
    """
    count, wrong = 0, list[str]()
    halves: dict[str, dict[str, Tensor]] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in _each(file):
            prefix, _, leaf = name.rpartition(".")
            count += tensor.numel()
            if description.get(name) in GRIDS:
                reason = _positive(tensor) if leaf.endswith("scale") else _finite(tensor)
            else:
                module = _owner(modules.get(prefix), leaf, tensor)
                ask = VALUES.get(leaf) if module is not None else None
                ask = _invertible if ask is _rotation and learned else ask
                reason = ask(tensor, module) if ask and module is not None else _finite(tensor)
                if module is not None and module.beside is not None:
                    reason = reason or module.beside.wrong(leaf, tensor, module.in_features)
            if reason:
                wrong.append(f"{name}: {reason}")
            if isinstance(_owner(modules.get(prefix), leaf, tensor), W4A8Dynamic):
                held = halves.setdefault(prefix, {})
                held[leaf] = tensor
                if {"weight", "weight_scale", "scale_bias"} <= held.keys():
                    wrong += _sums(prefix, **halves.pop(prefix))
    return count, wrong


def _owner(module: IntegerLinear | None, leaf: str, tensor: Tensor) -> IntegerLinear | None:
    """The linear to which a tensor belongs; None for one that does not fit, which the check of the tensors tells."""
    held = module.state_dict().get(leaf) if module is not None else None
    fits = (
        held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype and tensor.numel() > 0
    )
    return module if fits else None


def _sums(prefix: str, weight: Tensor, weight_scale: Tensor, scale_bias: Tensor, **rest: Tensor) -> list[str]:
    """Whether what the server takes off again, for nibbles without a sign, is what its weight makes of them."""
    wanted = sums(unpack_pairs(weight), weight_scale, scale_bias.shape[1])
    if not bool(wanted.isfinite().all()):
        return []  # told of the scale
    if torch.allclose(scale_bias, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max())):
        return []
    return [f"{prefix}.scale_bias: it is not eight times the sums of the weight"]


def _each(file: Path) -> Iterator[tuple[str, Tensor]]:
    entries: dict[str, Entry] = read_header(file)
    for name, entry in entries.items():
        yield name, read_tensors(file, {name: entry})[name]


def _finite(tensor: Tensor, module: IntegerLinear | None = None) -> str:
    if not tensor.is_floating_point():
        return ""
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # torch does not ask it of float8
    bad = int((~torch.isfinite(wide)).sum())
    return f"{bad} of {tensor.numel()} numbers are not finite" if bad else ""


def _integers(tensor: Tensor, module: IntegerLinear) -> str:
    if module.packed:
        return ""  # two integers in a byte: every byte is two of them
    low, high = -(2 ** (module.weight_bits - 1)), 2 ** (module.weight_bits - 1) - 1
    least, most = int(tensor.min()), int(tensor.max())
    if low <= least and most <= high:
        return ""
    return f"integers from {least} to {most}, {module.type} holds {low} to {high}"


def _positive(tensor: Tensor, module: IntegerLinear | None = None) -> str:
    if tensor.dtype == torch.int64:  # the bits of float32 numbers, for float16 models
        tensor = tensor.to(torch.int32).view(torch.float32)
    tensor = tensor.float() if tensor.itemsize == 1 else tensor
    bad = int((~(tensor > 0) | ~torch.isfinite(tensor)).sum())
    return f"{bad} of {tensor.numel()} scales are not positive numbers" if bad else ""


def _offset(tensor: Tensor, module: IntegerLinear) -> str:
    if module.offsets:  # what is stored is added
        return "" if torch.equal(tensor, tensor.round()) else "offsets of weights are whole numbers"
    return "" if not tensor.any() else "weights are symmetric, their offsets are zero"


def _rotation(tensor: Tensor, module: IntegerLinear) -> str:
    if reason := _finite(tensor):
        return reason
    wide = tensor.double()
    error = float((wide @ wide.T - torch.eye(len(wide), dtype=torch.float64)).abs().max())
    return "" if error <= ORTHOGONAL else f"not orthogonal: off by {error:.2g}, more than rounding does"


def _invertible(tensor: Tensor, module: IntegerLinear) -> str:
    if reason := _finite(tensor):
        return reason
    condition = float(torch.linalg.cond(tensor.double()))
    return (
        "" if condition <= CONDITION else f"can hardly be inverted: its condition number is {condition:.2g}"
    )


def _ratio(tensor: Tensor, module: IntegerLinear) -> str:
    return "" if bool(((tensor > 0) & (tensor <= 1)).all()) else "a clip ratio is above 0 and at most 1"


VALUES: Mapping[str, Callable[[Tensor, IntegerLinear], str]] = {
    "weight": _integers, "weight_scale": _positive, "weight_offset": _offset, "input_scale": _positive,
    "deq_scale": _positive, "heads_rotation": _rotation, "kronecker_rotation_m": _rotation,
    "kronecker_rotation_n": _rotation, "left_trans": _rotation, "right_trans": _rotation, "clip_ratio": _ratio,
}  # fmt: skip
"""What is asked of the values of each tensor of an integer linear."""
