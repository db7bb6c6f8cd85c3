"""Hadamard matrices of Williamson's form (1944) for orders that no quadratic residue gives.

Four symmetric circulants A, B, C, D of odd order m with A² + B² + C² + D² = 4 m I make one of order 4 m. Each
is its first row, and a symmetric row that starts with +1 is (m - 1) / 2 bits: bit i - 1 is set where entry i,
and entry m - i, is -1. The quadruples were found by a search that pairs rows by their power spectra.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

_ROWS: Mapping[int, tuple[int, int, int, int]] = MappingProxyType(
    {
        23: (0x2F0, 0x31A, 0x29F, 0x48A),
        29: (0x6E5, 0x24F5, 0x1CB, 0x1C24),
        39: (0x159F9, 0x7D346, 0x2BC37, 0x3C977),
    }
)


def has_williamson(order: int) -> bool:
    """Whether :func:`williamson` gives this order."""
    return order % 4 == 0 and order // 4 in _ROWS


def _circulant(m: int, bits: int) -> Tensor:
    half = [-1 if bits >> i & 1 else 1 for i in range((m - 1) // 2)]
    row = torch.tensor([1, *half, *reversed(half)], dtype=torch.int8)
    index = torch.arange(m)
    return row[(index - index.unsqueeze(1)) % m]


def williamson(order: int) -> Tensor:
    """A Hadamard matrix of ±1, int8 [order, order]; ValueError for an order without stored rows."""
    if not has_williamson(order):
        raise ValueError(f"no Williamson matrix of order {order} is known here: {[4 * m for m in _ROWS]} are")
    a, b, c, d = (_circulant(order // 4, bits) for bits in _ROWS[order // 4])
    array = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, dim=1) for row in array])
