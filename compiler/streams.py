"""Activations between blocks: microbatches of boundary values, float and quantized, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .certificate import back, into
from .contract import Basis
from .execute import Observer, Route, execute, inputs_of
from .program import Part, Program
from .view import LinearHook

Values = dict[str, Any]
"""Boundary values of one microbatch, by node name."""


@dataclass
class Stream:
    """The boundary values of every microbatch, in the basis after all rotations of the plan."""

    bases: tuple[Basis, ...]
    dtype: torch.dtype
    batches: list[Values] = field(default_factory=list)

    def enter(self, index: int, program: Program, part: Part, bases: Sequence[Basis]) -> dict[Any, Any]:
        """The inputs of a part for one microbatch, in the basis of another state of the program."""
        values = self.batches[index]
        return {node: self.move(node.name, values[node.name], bases) for node in inputs_of(program, part)}

    def move(self, name: str, value: Any, bases: Sequence[Basis]) -> Any:
        """A value of this stream in another basis."""
        if tuple(bases) == self.bases or not any(name in basis.values for basis in self.bases):
            return value
        original = back(name, value.float(), self.bases)
        return into(name, original, bases).to(value.dtype)

    def settle(self, name: str, value: Any, bases: Sequence[Basis]) -> Any:
        """A value computed in another basis, as this stream keeps it."""
        if tuple(bases) == self.bases or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return into(name, back(name, value.float(), bases), self.bases).to(value.dtype)

    def run(
        self, index: int, program: Program, part: Part, tensors: Mapping[str, Tensor], bases: Sequence[Basis],
        linear: LinearHook | None = None, route: Route | None = None, on_value: Observer | None = None,
    ) -> Values:  # fmt: skip
        """The outputs of a part for one microbatch, settled in this stream's basis."""
        env = self.enter(index, program, part, bases)
        outputs = execute(
            program, part, tensors, env, dtype=self.dtype, linear=linear, route=route, on_value=on_value
        )
        return {node.name: self.settle(node.name, value, bases) for node, value in outputs.items()}

    @torch.no_grad()
    def outputs(
        self, program: Program, part: Part, tensors: Mapping[str, Tensor], linear: LinearHook | None = None
    ) -> list[Values]:
        """The outputs of a part for every microbatch, where no rotation has changed the basis."""
        return [self.run(i, program, part, tensors, (), linear) for i in range(len(self.batches))]

    def logits(
        self,
        index: int,
        program: Program,
        part: Part,
        tensors: Mapping[str, Tensor],
        bases: Sequence[Basis] = (),
    ) -> Tensor:
        """What the epilogue makes of one microbatch, [tokens, vocabulary]."""
        env = self.enter(index, program, part, bases)
        with torch.no_grad():
            (logits,) = execute(program, part, tensors, env, dtype=self.dtype).values()
        return logits.flatten(0, -2)

    def advance(self, outputs: Sequence[Values], needed: frozenset[str]) -> None:
        """Take the outputs of a part in, and drop what no later part needs."""
        self.batches = [
            {name: value for name, value in {**values, **new}.items() if name in needed}
            for values, new in zip(self.batches, outputs, strict=True)
        ]

    def share(self) -> None:
        """Keep one copy of values that are the same in all microbatches (masks, rotary tables)."""
        first = self.batches[0]
        for values in self.batches[1:]:
            for name, value in values.items():
                mine = first[name]
                if isinstance(value, Tensor) and value.shape == mine.shape and torch.equal(value, mine):
                    values[name] = mine


def needed_after(program: Program) -> dict[int, frozenset[str]]:
    """For each part index, the names of values from this part or before that a later part reads."""
    readers: dict[str, int] = {}
    for part in program.parts:
        for node in inputs_of(program, part):
            readers[node.name] = max(readers.get(node.name, -1), part.index)
    return {
        part.index: frozenset(name for name, last in readers.items() if last > part.index)
        for part in program.parts
    }


def prologue(
    program: Program, tensors: Mapping[str, Tensor], ids: Tensor, microbatch: int, dtype: torch.dtype,
    bases: tuple[Basis, ...],
) -> Stream:  # fmt: skip
    """Embed token ids [n, length] and compute what all blocks share, in microbatches of sequences."""
    stream = Stream(bases, dtype)
    part = program.parts[0]
    names = {node.name: node for node in inputs_of(program, part)}
    for rows in ids.split(microbatch):
        inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        env = {node: inputs[name] for name, node in names.items()}
        with torch.no_grad():
            outputs = execute(program, part, tensors, env, dtype=dtype)
        values = {node.name: stream.settle(node.name, value, ()) for node, value in outputs.items()}
        stream.batches.append({**inputs, **values})
    stream.share()
    return stream
