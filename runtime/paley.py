"""Hadamard matrices from quadratic residues (Paley, 1933), over every finite field of odd order."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``q == p**k`` and p prime, or None where q is no prime power."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k, rest = 0, q
    while rest % p == 0:
        k, rest = k + 1, rest // p
    return (p, k) if rest == 1 else None


def _elements(p: int, k: int) -> Tensor:
    """The p^k polynomials of degree below k, int64 [p^k, k], lowest coefficient first, counting in base p."""
    return torch.arange(p**k).unsqueeze(1) // p ** torch.arange(k) % p


def _squares(p: int, k: int, tail: Tensor) -> Tensor:
    """Index of the square of every element of GF(p)[x] / (x^k + tail(x)), int64 [p^k]; tail int64 [k]."""
    elements = _elements(p, k)
    product = torch.zeros(p**k, 2 * k - 1, dtype=torch.int64)
    for i in range(k):
        product[:, i : i + k] += elements[:, i : i + 1] * elements
    for top in range(2 * k - 2, k - 1, -1):
        product[:, top - k : top] -= product[:, top : top + 1] % p * tail
    return product[:, :k] % p @ p ** torch.arange(k)


@cache
def _character(p: int, k: int) -> Tensor:
    """chi of the p^k elements of the field of that (odd) order, int8: 0 for zero, 1 for squares, else -1.

    A quotient ring is the field exactly when only zero squares to zero (otherwise it has a nilpotent) and no
    element has more than two square roots (a product of rings has four), so moduli are tried until one is.
    """
    for tail in _elements(p, k):
        roots = torch.bincount(_squares(p, k, tail), minlength=p**k)
        if roots[0] == 1 and roots.max() == 2:
            character = torch.where(roots > 0, 1, -1).to(torch.int8)
            character[0] = 0
            return character
    raise AssertionError(f"GF({p}) has no irreducible polynomial of degree {k}")


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = chi(a_i - a_j) over the field of odd order q, int8 [q, q]: Q Qᵀ = q I - J, Q J = 0."""
    factors = prime_power(q)
    if factors is None or factors[0] == 2:
        raise ValueError(f"there is no finite field of odd order {q}")
    p, k = factors
    elements = _elements(p, k)
    difference = torch.zeros(q, q, dtype=torch.int64)
    for digit in range(k):
        column = elements[:, digit]
        difference += (column.unsqueeze(1) - column) % p * p**digit
    return _character(p, k)[difference]


def has_paley(order: int) -> bool:
    """Whether Paley's first or second construction gives this order."""
    return order % 4 == 0 and (prime_power(order - 1) is not None or _second(order))


def _second(order: int) -> bool:
    q = order // 2 - 1
    return order % 4 == 0 and q % 4 == 1 and prime_power(q) is not None


def paley(order: int) -> Tensor:
    """A Hadamard matrix of ±1, int8 [order, order]; ValueError where neither construction gives the order.

    The first takes a prime power q = order - 1 (then q = 3 mod 4), the second q = order / 2 - 1 = 1 mod 4.
    """
    if not has_paley(order):
        raise ValueError(f"Paley's constructions give no Hadamard matrix of order {order}")
    first = prime_power(order - 1) is not None
    q = order - 1 if first else order // 2 - 1
    bordered = torch.ones(q + 1, q + 1, dtype=torch.int8)
    bordered[0, 0] = 0
    bordered[1:, 1:] = _jacobsthal(q)
    identity = torch.eye(q + 1, dtype=torch.int8)
    if first:
        bordered[1:, 0] = -1
        return identity + bordered
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(bordered, plus) + torch.kron(identity, minus)
