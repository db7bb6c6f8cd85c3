"""Eight int4 in an int32: the form in which the NPU takes int4 weights and gives int4 activations.

Element 0 is in the lowest four bits, as ``npu_convert_weight_to_int4pack`` packs.
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_WORD = 8


def pack_int4(integers: Tensor) -> Tensor:
    """int8 [..., K] of -8..7 to int32 [..., K / 8]. ValueError where 8 does not divide K."""
    if integers.shape[-1] % PER_WORD:
        raise ValueError(f"{integers.shape[-1]} int4 do not fill words of {PER_WORD}")
    nibbles = (integers.to(torch.int32) & 15).unflatten(-1, (-1, PER_WORD))
    packed = nibbles[..., 0].clone()
    for place in range(1, PER_WORD):
        packed |= nibbles[..., place] << (4 * place)
    return packed


def unpack_int4(packed: Tensor) -> Tensor:
    """Invert ``pack_int4``: int32 [..., K / 8] to int8 [..., K]."""
    places = [
        (packed << (28 - 4 * place)) >> 28 for place in range(PER_WORD)
    ]  # shifts of int32 keep the sign
    return torch.stack(places, dim=-1).flatten(-2).to(torch.int8)


def as_int4(weight: Tensor) -> Tensor:
    """An int4 weight as int8 [out, in], stored so or packed."""
    return unpack_int4(weight) if weight.dtype == torch.int32 else weight
