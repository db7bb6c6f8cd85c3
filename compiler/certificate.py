"""Certificates: a rewrite that claims to keep the function is executed before and after, in float64.

Proved at the block's delta (what it adds to the hidden state), not at its output: outlier channels of the
residual stream would drown a bug there (a forgotten reader shows 0.68 on the delta and 0.013 on the output).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.divided import owner_of
from .contract import Basis
from .edit import Edit, apply, by_module
from .errors import NotEquivalent
from .execute import execute, in_turn, inputs_of
from .operand import Slot
from .pieces import rounded
from .program import Part, Program
from .view import LinearHook

LIMIT = 1e-9
"""Largest relative Frobenius error of an EXACT rewrite, all ops in float64."""


@dataclass(frozen=True)
class Certificate:
    """What a proof measured: relative Frobenius errors on the rows it ran."""

    math: float
    """Before against after, everything in float64."""
    stored: float
    """The same with the tensors that the rewrite changed cast to the dtype of export."""
    rows: int
    """Tokens it ran on, calibration text and random."""


class Edited(Mapping[str, Tensor]):
    """The tensors of a part after some edits, computed when looked up, in ``dtype``; nothing is kept but one module."""

    def __init__(
        self, program: Program, base: Mapping[str, Tensor], edits: Sequence[Edit], values: Mapping[Slot, Any],
        dtype: torch.dtype = torch.float64, rounded: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.program, self.base, self.edits, self.values = program, base, by_module(edits), values
        self.dtype, self.rounded = dtype, rounded
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def __getitem__(self, name: str) -> Tensor:
        module, local = owner_of(name)
        if module not in self.edits:
            return self.base[name].to(self.dtype)
        if self._last[0] != module:
            self.forget()
            new = apply(self.program, module, self.edits[module], self.values, self.base.get, self.dtype)
            if self.rounded is not None:
                new = {k: rounded(v, self.rounded) if v.is_floating_point() else v for k, v in new.items()}
            self._last = (module, new)
        found = self._last[1].get(local)  # not every tensor of a module belongs to what is edited
        return self.base[name].to(self.dtype) if found is None else found

    def forget(self) -> None:
        """Let the module that is kept go."""
        self._last = ("", {})

    def __contains__(self, name: object) -> bool:
        try:
            self[str(name)]
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


class Cast(Mapping[str, Tensor]):
    """Tensors with the values that ``dtype`` holds, float64, made when they are looked up; others as they are."""

    def __init__(self, base: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.base, self.dtype = base, dtype

    def __getitem__(self, name: str) -> Tensor:
        found = self.base[name]
        return found.to(self.dtype).double() if found.is_floating_point() else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def into(name: str, value: Any, bases: Sequence[Basis]) -> Any:
    """A value of the original program in the basis after these rotations."""
    for basis in bases:
        if name in basis.values:
            value = basis.rotation.times(value)
    return value


def back(name: str, value: Any, bases: Sequence[Basis]) -> Any:
    """The inverse of :func:`into`."""
    for basis in reversed(bases):
        if name in basis.values:
            value = basis.rotation.times_transposed(value)
    return value


def outcome(
    program: Program,
    part: Part,
    tensors: Mapping[str, Tensor],
    env: Mapping[str, Any],
    bases: Sequence[Basis],
    linear: LinearHook | None = None,
) -> dict[str, Tensor]:
    """What a part computes in float64, by name, in the original basis; ``env`` is in the original basis too.

    Rows are sent to all experts in turn, so that every one of them is looked at.
    """
    nodes = {node.name: node for node in inputs_of(program, part)}
    inputs = {node: into(name, env[name], bases) for name, node in nodes.items()}
    with torch.no_grad():
        outputs = execute(program, part, tensors, inputs, dtype=torch.float64, linear=linear, route=in_turn)
    return {node.name: back(node.name, value, bases) for node, value in outputs.items()}


def error(before: Mapping[str, Any], after: Mapping[str, Any], env: Mapping[str, Any]) -> float:
    """Largest relative Frobenius error of the float results.

    A result with the shape of a float input is judged by its delta, what the part added to that input.
    """
    worst = 0.0
    entering = [v for v in env.values() if isinstance(v, Tensor) and v.is_floating_point()]
    for name, want in before.items():
        if not isinstance(want, Tensor) or not want.is_floating_point():
            continue
        got = after[name]
        if not bool(torch.isfinite(got).all()):
            return float("inf")
        inputs = [value for value in entering if value.shape == want.shape]
        sizes = [float(torch.linalg.vector_norm(want - value)) for value in inputs]
        size = min(sizes, default=float(torch.linalg.vector_norm(want)))
        wrong = float(torch.linalg.vector_norm(got - want))
        worst = max(worst, wrong / size if size > 0 else wrong)
    return worst


def check(where: str, math: float, reproducer: str) -> None:
    """Stop when an EXACT rewrite changed the function."""
    if not math < LIMIT:
        raise NotEquivalent(
            f"{where}: the rewrite claims to keep the function, but changes it by {math:.2g} (relative, float64; "
            f"limit {LIMIT:g}). Nothing was written. Reproduce with: {reproducer}"
        )


def random_rows(like: Tensor, seed: int, name: str) -> Tensor:
    """Gaussian rows of the same shape and root mean square per token, a function of (seed, name) alone."""
    digest = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(digest), dtype=torch.float64)
    return noise * like.pow(2).mean().sqrt()
