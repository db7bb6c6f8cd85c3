"""Hadamard matrices (H Hᵀ = n I, entries ±1), derived and not tabulated, and rotations made of them."""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

from .paley import has_paley, paley
from .williamson import has_williamson, williamson


@cache
def _factors(n: int) -> tuple[int, ...] | None:
    """Orders of the cores whose Kronecker product has order n, or None. Doublings come last."""
    if n in (1, 2):
        return (n,)
    if n < 1 or n % 4:
        return None
    if half := _factors(n // 2):
        return (*half, 2)
    if has_paley(n) or has_williamson(n):
        return (n,)
    for d in range(4, int(n**0.5) + 1, 4):
        if n % d == 0 and (left := _factors(d)) and (right := _factors(n // d)):
            return (*left, *right)
    return None


def has_hadamard(n: int) -> bool:
    """Whether :func:`hadamard` gives a matrix of order n."""
    return _factors(n) is not None


def _known(n: int) -> tuple[int, ...]:
    factors = _factors(n)
    if factors is None:
        why = (
            "none is constructed by Paley, Williamson or a product of smaller ones"
            if n > 0 and n % 4 == 0
            else "orders are 1, 2 and multiples of 4"
        )
        raise ValueError(f"no Hadamard matrix of order {n} ({why}): use a random orthogonal matrix instead")
    return factors


def _core(order: int) -> Tensor:
    if order <= 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)[:order, :order]
    return paley(order) if has_paley(order) else williamson(order)


def hadamard(n: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """A Hadamard matrix of ±1, [n, n]: H Hᵀ = n I. ValueError for an order that is not available.

    Sylvester's doubling and Kronecker products of the cores of Paley (any prime power) and Williamson.
    """
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for order in _known(n):
        matrix = torch.kron(matrix, _core(order))
    return matrix.to(dtype)


def _generator(kind: str, *numbers: int) -> torch.Generator:
    """A private generator whose stream is a function of the arguments alone."""
    digest = hashlib.sha256(repr((kind, *numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def random_signs(n: int, seed: int) -> Tensor:
    """n random ±1, float64 [n]: a function of (n, seed) alone."""
    bits = torch.randint(0, 2, (n,), generator=_generator("signs", n, seed))
    return (2 * bits - 1).to(torch.float64)


def random_hadamard(n: int, seed: int, *, block_size: int = -1) -> Tensor:
    """An orthogonal matrix Q = diag(signs) Hᵀ / sqrt(order), float64 [n, n]: Q Qᵀ = I.

    With ``block_size`` B it is block-diagonal: one B x B matrix of this kind, repeated n / B times. It is a
    function of (n, block_size, seed) alone and touches no global random state. ValueError for an order that
    is not available or a block that does not divide n. Source: QuIP# and QuaRot.
    """
    order = n if block_size == -1 else block_size
    if order < 1 or n % order:
        raise ValueError(f"block_size {block_size} does not divide the width {n}: choose a divisor, or -1")
    block = random_signs(order, seed).unsqueeze(1) * hadamard(order).T.contiguous() / order**0.5
    return block if order == n else torch.kron(torch.eye(n // order, dtype=block.dtype), block)


def random_orthogonal(n: int, seed: int) -> Tensor:
    """A random orthogonal matrix, uniform over O(n), float64 [n, n]: a function of (n, seed) alone."""
    gaussian = torch.randn(n, n, generator=_generator("orthogonal", n, seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()
