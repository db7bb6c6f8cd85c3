"""Kronecker-factored rotations: the transform that the server's int4 linear applies to its input.

The activation row x[K] is read as X[a, b] and becomes Lᵀ X R; a weight row W[a, b] becomes L⁻¹ W R⁻ᵀ, so that
the products are what they were. Under tensor parallelism each of n ranks transforms its own K / n channels
with the same pair, so here K may be n blocks of a * b. Source: FlatQuant (Sun et al., 2024).
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

LARGEST_FACTOR = 256
"""Widest side of a factor that the NPU kernel takes."""


def split(width: int) -> tuple[int, int]:
    """``(a, b)`` with a * b = width and a <= b nearest to its square root: the server's own choice.

    ValueError where the kernel cannot run it: b must be a multiple of 8 and neither side above 256.
    """
    if width < 8 or width % 8:
        raise ValueError(f"width {width} cannot carry a Kronecker rotation: it is not a multiple of 8")
    mean = isqrt(width - 1) + 1  # Fermat: width = mean² - half²
    while isqrt(mean * mean - width) ** 2 != mean * mean - width:
        mean += 1
    half = isqrt(mean * mean - width)
    a, b = mean - half, mean + half
    if b % 8:
        raise ValueError(
            f"width {width} splits into {a} x {b}, and the kernel needs {b} to be a multiple of 8"
        )
    if b > LARGEST_FACTOR:
        raise ValueError(
            f"width {width} splits into {a} x {b}, and the kernel takes at most {LARGEST_FACTOR}"
        )
    return a, b


def laos_split(width: int) -> tuple[int, int]:
    """``(m, k)`` with m * k = width nearest to its square root, both 1, 2 or a multiple of 4 up to 256.

    The split of the reference tool's online rotation of down projections (spec/modelslim.md 2.10.7). ValueError where
    there is none.
    """
    allowed = {1, 2, *range(4, LARGEST_FACTOR + 1, 4)}
    for m in sorted((m for m in allowed if width % m == 0 and width // m in allowed), reverse=True):
        if m * m <= width:
            return m, width // m
    raise ValueError(f"width {width} is no product of two factors that are 1, 2 or a multiple of 4 up to 256")


def blocks(width: int, left: Tensor, right: Tensor) -> int:
    """How many times the pair ``left`` [a, a], ``right`` [b, b] acts side by side on ``width`` channels.

    ValueError where a factor is not square or a * b does not divide the width.
    """
    a, b = left.shape[0], right.shape[0]
    if left.shape != (a, a) or right.shape != (b, b) or width % (a * b):
        raise ValueError(f"factors {tuple(left.shape)} and {tuple(right.shape)} do not fit width {width}")
    return width // (a * b)


def rotate(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Lᵀ X R of every block of every row: [..., K] to [..., K], in the dtype of x."""
    n, a, b = blocks(x.shape[-1], left, right), left.shape[0], right.shape[0]
    rows = x.reshape(-1, n, a, b) @ right.to(x.dtype)
    return (rows.transpose(-1, -2) @ left.to(x.dtype)).transpose(-1, -2).reshape(x.shape)


def fold(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """L⁻¹ W R⁻ᵀ of every block of every row: [out, K] to [out, K], in the dtype of the weight.

    Pass the factors as they will be stored: inverted in float64, they cancel the online rotation exactly even
    where rounding took their orthogonality (a bfloat16 Hadamard factor has a gain of up to 1.0024).
    ValueError for a factor that cannot be inverted.
    """
    blocks(weight.shape[-1], left, right)
    inverses = []
    for name, factor in (("left", left), ("right", right)):
        inverse, singular = torch.linalg.inv_ex(factor.to(torch.float64))
        if singular or not inverse.isfinite().all():
            raise ValueError(f"the {name} factor of shape {tuple(factor.shape)} cannot be inverted")
        inverses.append(inverse)
    rows = (
        rotate(chunk.to(torch.float64), inverses[0].T, inverses[1].T).to(weight.dtype)
        for chunk in weight.split(1024)
    )
    return torch.cat(list(rows))
