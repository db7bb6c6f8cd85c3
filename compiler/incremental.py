"""The values of a part while its rewrites are proved: a rewrite is run where it changes something, and nowhere else."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime.divided import owner_of
from .canon import mutates
from .certificate import back, into
from .contract import Basis
from .execute import execute, in_turn, inputs_of, outputs_of
from .program import Part, Program


class Values:
    """Every value of one part in float64, in one state of the program.

    Args:
        program: The state.
        part: The part.
        tensors: Its parameters.
        env: What enters the part, by name, in the basis of the original program.
        bases: The rotations between that basis and the state's own.
    """

    def __init__(
        self, program: Program, part: Part, tensors: Mapping[str, Tensor], env: Mapping[str, Any],
        bases: Sequence[Basis],
    ) -> None:  # fmt: skip
        self.program, self.bases = program, bases
        self.nodes = list(program.nodes(part))
        self.outputs = outputs_of(program, part)
        self.values: dict[fx.Node, Any] = {
            node: into(node.name, env[node.name], bases) for node in inputs_of(program, part)
        }
        self.written = {node.all_input_nodes[0] for node in self.nodes if mutates(node)}
        self.values |= self._run(self.nodes, tensors)

    def _run(self, nodes: Sequence[fx.Node], tensors: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
        found: dict[fx.Node, Any] = {}

        def keep(node: fx.Node, given: tuple[Any, ...], value: Any) -> None:
            found[node] = value

        env = {node: self.values[node] for node in inputs_of(self.program, nodes)}
        with torch.no_grad():
            execute(self.program, nodes, tensors, env, dtype=torch.float64, on_value=keep, route=in_turn)
        return found

    def changed(self, modules: Collection[str], tensors: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
        """The values that are others when the tensors of some modules are."""
        dirty = {
            node
            for node in self.nodes
            if (node.op == "call_module" and str(node.target) in modules)
            or (node.op == "get_attr" and owner_of(str(node.target))[0] in modules)
        }
        for node in self.nodes:
            if any(source in dirty for source in node.all_input_nodes):
                dirty.add(node)
        if any(source in self.written and source not in dirty for n in dirty for source in n.all_input_nodes):
            return self._run(self.nodes, tensors)  # an op in place has written over what would be read again
        return self._run([node for node in self.nodes if node in dirty], tensors)

    def results(self, changed: Mapping[fx.Node, Any] | None = None) -> dict[str, Any]:
        """What leaves the part, by name, in the basis of the original program, after some values changed."""
        found = self.values | dict(changed or {})
        return {node.name: back(node.name, found[node], self.bases) for node in self.outputs}
