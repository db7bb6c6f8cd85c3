"""What of a plan lies in one part of a program: its rewrites, its tensors, the values that it must come up with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..runtime.quantized import QuantizedLinear
from .contract import Rewrite
from .edit import Edit
from .errors import Failed
from .laws import shape
from .operand import Quantize, Slot, Stub
from .plan import Plan, Step
from .program import Part, Program
from .rows import RowwiseTensor, is_rowwise


def restricted(step: Step, program: Program, part: Part) -> tuple[Rewrite, ...]:
    """The rewrites of a step, each with the edits whose modules lie in one part."""
    inside = {str(node.target) for node in program.nodes(part) if node.op == "call_module"}
    names = {node.name for node in program.nodes(part)}
    found = []
    for rewrite in step.answer.rewrites:
        edits: tuple[Edit, ...] = tuple(
            edit
            for edit in rewrite.edits
            if edit.site.module in inside or (isinstance(edit.operand, Stub) and edit.operand.node in names)
        )
        if edits:
            found.append(replace(rewrite, edits=edits))
    return tuple(found)


def planned_linears(plan: Plan) -> dict[str, Quantize]:
    """What the passes of a plan are going to make of linears."""
    return {
        edit.site.module: edit.operand
        for step in plan.steps
        for rewrite in step.answer.rewrites
        for edit in rewrite.edits
        if isinstance(edit.operand, Quantize)
    }


def online_linears(plan: Plan) -> dict[str, str]:
    """Linears behind an online rotation that is stored beside them, with its kind."""
    return {
        str(node.target): node.meta["rotated"].layout
        for node in plan.final.graph.nodes
        if "rotated" in node.meta and node.meta["rotated"].layout != "flatquant"
    }


def own_names(program: Program, part: Part) -> list[str]:
    """Parameters and persistent buffers of the modules of a part, tied ones under their own names."""
    names: dict[str, None] = {}
    for node in program.nodes(part):
        if node.op == "get_attr":
            names[str(node.target)] = None
        elif node.op == "call_module":
            module = program.root.get_submodule(str(node.target))
            names |= {f"{node.target}.{local}": None for local, _ in module.named_parameters()}
            names |= {f"{node.target}.{local}": None for local, _ in module.named_buffers()}
    known = set(program.source.names()) | set(program.ties)
    return [name for name in names if name not in program.constants and name in known]


def main_value(outputs: Mapping[str, Any], plan: Plan) -> str:
    """The name of the hidden state among the outputs of a block."""
    floats = [
        name for name, value in outputs.items() if isinstance(value, Tensor) and value.is_floating_point()
    ]
    if len(floats) != 1:
        raise Failed(f"a block hands on {len(floats)} float values; training needs exactly one")
    return floats[0]


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Float tensors in the dtype of execution."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def check_values(rewrite: Rewrite, values: Mapping[Slot, Any]) -> None:
    """All slots filled, with finite tensors of the declared shape."""
    for slot in rewrite.slots:
        value = values.get(slot)
        if value is None:
            raise Failed(f"{rewrite.pass_name} at {rewrite.where}: {slot.name} was not solved")
        tensors: Iterable[Tensor] = (
            (value.weight, value.scale) if isinstance(value, QuantizedLinear) else (value,)
        )
        for tensor in tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise Failed(
                    f"{rewrite.pass_name} at {rewrite.where}: {slot.name} is not finite. Look at the weights and "
                    "the calibration data of this site"
                )
        main: Sequence[int] = value.weight.shape if isinstance(value, QuantizedLinear) else value.shape
        if tuple(main) != slot.shape:
            raise Failed(f"{rewrite.pass_name}: {slot.name} has shape {tuple(main)}, declared {slot.shape}")


def loaded(
    plan: Plan, part: Part, edits: Mapping[str, Sequence[Edit]]
) -> tuple[dict[str, Tensor], dict[str, RowwiseTensor]]:
    """The tensors of a part, float32, and its tables as they are stored, where all ``edits`` of them go row by row.

    Grids of attentions are zero, which changes nothing.
    """
    program, source = plan.program, plan.program.source
    tensors: dict[str, Tensor] = {}
    tables: dict[str, RowwiseTensor] = {}
    for name, tensor in source.load(own_names(program, part)).items():
        source.check_finite(name, tensor)
        module = name.rpartition(".")[0]
        leaf = program.leaves.get(module)
        if part.kind < 0 and leaf is not None and is_rowwise(leaf, name, tensor, edits.get(module, ())):
            tables[name] = RowwiseTensor(module, name, tensor)
            continue
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    for node in plan.final.nodes(part):
        if node.meta.get("stub"):
            tensors[str(node.target)] = torch.zeros(shape(node))
    return tensors, tables
