"""Rows of a program: one per value, with the names that every rendering uses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..canon import WHOLE, op_name, symbolic
from ..program import Leaf, Part, Program
from .alike import alike_experts

DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "bool",
}


@dataclass(frozen=True)
class Row:
    """One value of a part. Two rows are equal where they say the same, whatever layer they stand in."""

    name: str
    """Name in the part: ``v3``; ``input_ids`` for a placeholder; empty for the output."""
    op: str
    """Kind of a leaf, name of an op, ``input``, ``parameter``, ``alike`` or ``return``."""
    target: str
    """Module of a leaf or name of a parameter, without the part's own prefix; empty for an op."""
    args: str
    type: str
    """Dtype and shape, e.g. ``bf16[b, s, 576]``."""
    detail: str
    """Shapes of a leaf's parameters, facts of a norm."""
    edits: tuple[str, ...]
    """What passes did to its weights, in order: ``iter_smooth scale_in``."""
    note: str
    """What an edit left at the node."""
    node: fx.Node
    """The node itself; not a part of the row's text."""

    def line(self) -> str:
        """The row as text, without a newline."""
        if self.op == "return":
            return f"return {self.args}"
        if self.op == "alike":
            return self.target
        head = f"{self.name}: {self.type} = {self.op}" + (f" {self.target}" if self.target else "")
        head += f"({self.args})" if self.op not in ("input", "parameter") else ""
        head += f"  {self.detail}" if self.detail else ""
        head += f" <- {', '.join(self.edits)}" if self.edits else ""
        return head + (f"  # {self.note}" if self.note else "")


class Sizes:
    """Symbols of a program's shapes written as ``b`` and ``s``."""

    def __init__(self, program: Program) -> None:
        self._names: dict[str, str] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                for letter, size in zip("bs", node.meta["val"].shape, strict=False):
                    self._names.setdefault(str(size), letter)

    def __call__(self, size: Any) -> str:
        """Text of one size."""
        return re.sub(r"\bs\d+\b", lambda m: self._names.get(m.group(), m.group()), str(size))

    def type(self, val: Any) -> str:
        """Dtype and shape of a value."""
        if not isinstance(val, Tensor):
            return type(val).__name__
        dtype = DTYPES.get(val.dtype, str(val.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(self(size) for size in val.shape)}]"


def _detail(leaf: Leaf) -> str:
    words = [f"{name} {list(shape)}" for name, shape in leaf.parameters.items()]
    if leaf.transposed:
        words.append("transposed")
    if leaf.norm is not None:
        words.insert(0, "layer norm" if leaf.norm.mean_subtracting else "rms norm")
        words.append(f"eps {leaf.norm.eps:g}")
        if leaf.norm.offset:
            words.append(f"gain {leaf.norm.offset:g} + weight")
    return ", ".join(words)


def _spell(value: Any, names: dict[fx.Node, str], sizes: Sizes) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        words = [_spell(v, names, sizes) for v in value]
        said = [word for word in words if word]
        more = [f"{len(words) - len(said)} more"] if len(said) < len(words) else []
        return "[" + ", ".join(said + more) + "]"
    if isinstance(value, torch.dtype):
        return DTYPES.get(value, str(value))
    if isinstance(value, float):
        return repr(value)
    return "end" if value == WHOLE and isinstance(value, int) else str(value)


def _op(node: fx.Node) -> str:
    return op_name(node) or getattr(node.target, "__name__", str(node.target))


def outside(program: Program, part: Part) -> tuple[fx.Node, ...]:
    """Values from other parts that a part reads, in order of first use; shapes are not counted as reading."""
    seen: dict[fx.Node, None] = {}
    for node in program.nodes(part):
        if symbolic(node):
            continue
        for source in node.all_input_nodes:
            if source.meta["part"] != part.index:
                seen[source] = None
    return tuple(seen)


def rows(program: Program, part: Part, sizes: Sizes, known: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of one part in graph order. Values from outside are ``in0``, ``in1``, ... by first use.

    Experts that are alike have the rows of the first of them, and one that counts the others.

    Args:
        program: A program.
        part: One of its parts.
        sizes: Of the same program.
        known: Names of rows by the name of their node in the graph, as another state of the program has them; what
            is not among them is ``new0``, ``new1``, ... So equal lines of two states are equal.
    """
    names = {node: f"in{i}" for i, node in enumerate(outside(program, part))}
    hidden = alike_experts(program, part)
    prefix = part.name + "." if part.kind >= 0 else ""
    count = 0
    for node in program.nodes(part):
        val = node.meta.get("val")
        if symbolic(node):
            names[node] = sizes(val)
            continue
        if node in hidden:
            names[node] = ""
            if hidden[node] is not None:
                yield Row("", "alike", str(hidden[node]), "", "", "", (), "", node)
            continue
        args = ", ".join(
            [_spell(a, names, sizes) for a in node.args]
            + [
                f"{k}={_spell(v, names, sizes)}"
                for k, v in node.kwargs.items()
                if k not in ("device", "pin_memory")
            ]
        )
        note = str(node.meta.get("note", ""))
        if node.op == "output":
            yield Row("", "return", "", args, "", "", (), note, node)
            continue
        leaf = program.leaf(node)
        target, detail, op = "", "", _op(node)
        if node.op == "placeholder":
            names[node], op = str(node.target), "input"
        else:
            names[node] = f"v{count}" if known is None else known.get(node.name, f"new{count}")
            count += known is None or node.name not in known
        if node.op == "get_attr":
            op, target = "parameter", str(node.target).removeprefix(prefix)
        elif leaf is not None:
            op, target, detail = leaf.kind, str(node.target).removeprefix(prefix), _detail(leaf)
        edits = node.meta.get("edits", ())
        yield Row(names[node], op, target, args, sizes.type(val), detail, edits, note, node)


def names_of(program: Program, part: Part, sizes: Sizes) -> dict[fx.Node, str]:
    """Printed names of the values that a part computes."""
    return {row.node: row.name for row in rows(program, part, sizes) if row.name}
