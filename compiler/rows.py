"""Tables too large to edit at once: the embedding and the head are rewritten row by row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .edit import Edit, Verb, apply
from .operand import Slot
from .program import Leaf, Program

CHUNK = 2048
"""Rows that are computed in float64 at a time."""
ROWWISE = {
    "embedding": frozenset({Verb.ROTATE_OUT, Verb.UNTIE}),
    "linear": frozenset({Verb.SCALE_IN, Verb.ROTATE_IN, Verb.UNTIE}),
}
"""Verbs that treat each row of a table, or of a head's weight, by itself."""


def is_rowwise(leaf: Leaf, name: str, tensor: Tensor, edits: Iterable[Edit]) -> bool:
    """Whether all edits of a tensor act on its rows one by one."""
    allowed = ROWWISE.get(leaf.kind)
    if allowed is None or leaf.transposed or not name.endswith(".weight") or tensor.dim() != 2:
        return False
    return all(edit.verb in allowed for edit in edits)


class RowwiseTensor:
    """A table [rows, channels] in its storage dtype, with edits that are applied in chunks when it is finished."""

    def __init__(self, module: str, name: str, full: Tensor) -> None:
        self.module, self.name, self.full = module, name, full
        self.pending: list[tuple[list[Edit], Mapping[Slot, Any], Mapping[str, Tensor]]] = []
        self.sample = torch.arange(min(len(full), CHUNK))

    def sampled(self, program: Program) -> Tensor:
        """The rows that proofs look at (the prover chooses them), with all edits so far, float32."""
        return self.rows(program, self.sample).float()

    def copy(self) -> RowwiseTensor:
        """The same table with the edits so far, which can go another way."""
        other = RowwiseTensor(self.module, self.name, self.full)
        other.pending, other.sample = list(self.pending), self.sample
        return other

    def edit(self, edits: list[Edit], values: Mapping[Slot, Any], before: Mapping[str, Tensor]) -> None:
        """Note edits for later; ``before`` is the state they read."""
        self.pending.append((edits, values, before))

    def rows(self, program: Program, index: Tensor | slice) -> Tensor:
        """Some rows with all edits so far, float64."""
        rows = self.full[index].double()
        for edits, values, before in self.pending:
            get = lambda name, rows=rows, before=before: rows if name == self.name else before.get(name)  # noqa: E731
            rows = apply(program, self.module, edits, values, get, torch.float64)["weight"]
        return rows

    def finished(self, program: Program, dtype: torch.dtype) -> Tensor:
        """The whole table with all edits, in the dtype of export."""
        if not self.pending:
            return self.full.to(dtype)
        done = torch.empty(self.full.shape, dtype=dtype)
        for start in range(0, len(self.full), CHUNK):
            chunk = slice(start, start + CHUNK)
            done[chunk] = self.rows(program, chunk).to(dtype)
        return done
