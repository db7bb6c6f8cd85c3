"""The diagram of one part of a program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx

from ...runtime.divided import divided
from ...runtime.kronecker import rotate
from ..canon import op_name, symbolic
from ..contract import Rewrite
from ..laws import is_attention
from ..program import Part, Program
from .diagram import Arrow, Box, Diagram, Kind
from .marks import marks
from .matched import Matched
from .regions import INSERTED, STUBS, THROUGH, Region, arrow_only, regions, rotary, sources
from .rows import Row, Sizes, outside, rows
from .runs import Binding, Run, bindings, boundary

SYMBOLS = {"add": "+", "mul": "×", "sub": "−", "div": "÷", "__and__": "and", "__or__": "or"}
MOST_OPS = 4
"""Ops that the title of a box names; of more it gives the number."""


def block_diagram(
    program: Program,
    part: Part,
    *,
    matches: Iterable[Matched] = (),
    rewrites: Iterable[Rewrite] = (),
    whole: bool = True,
    run: Run | None = None,
) -> Diagram:
    """One part of a program (the prologue, a block, the epilogue) as boxes and arrows.

    Args:
        program: A program in any state of a plan.
        part: The part.
        matches: What is highlighted, see ``matched``.
        rewrites: What passes did so far: the caption of a match names those that rewrote it.
        whole: Whether ops that nothing else reads are drawn in the box of their reader; False draws every row.
        run: The run that the part stands for, which gives the title and says where its inputs come from.
    """
    sizes, run = Sizes(program), run or Run((part,))
    told = {row.node: row for row in rows(program, part, sizes)}
    found = regions(program, part, whole=whole)
    drawing = _Drawing(told, sizes, outside(program, part))
    computed = [_computed(node) for node in outside(program, part)]
    for binding in bindings(program, run, sizes):
        drawing.outside(binding, computed[int(binding.name.removeprefix("in"))])
    for region in found:
        drawing.region(program, part, region, hide=whole and arrow_only(region))
    for node in boundary(program, part):
        drawing.output(node)
    diagram = Diagram(run.title, tuple(drawing.boxes), tuple(drawing.arrows))
    return marks(diagram, drawing.place, matches, tuple(rewrites))


class _Drawing:
    """Boxes and arrows so far, and in which box each value is."""

    def __init__(self, told: Mapping[fx.Node, Row], sizes: Sizes, given: tuple[fx.Node, ...]) -> None:
        self.told, self.sizes = told, sizes
        self.boxes: list[Box] = []
        self.arrows: list[Arrow] = []
        self._at = {node: f"in{i}" for i, node in enumerate(given)}
        self.place = {node.name: id for node, id in self._at.items()}
        """Id of the box in which a module or the node of a value is drawn, by the name of either."""

    def outside(self, binding: Binding, computed: str) -> None:
        """A value that another part computes; ``computed`` is the op that does."""
        if any(box.id == binding.name for box in self.boxes):
            return
        near = all(source.startswith("before.") for source in binding.sources[-1:])
        title = f"{binding.name} {computed}" if computed and not near else binding.name
        self.boxes.append(Box(binding.name, "input", title, (binding.type,), rows=(str(binding),)))

    def region(self, program: Program, part: Part, region: Region, *, hide: bool) -> None:
        """A box for a region, or none where it only hands on a value."""
        read = sources(region)
        if hide:
            id = self._at[read[0]]
        else:
            box = self._box(program, part, region)
            id = box.id
            self.boxes.append(box)
            for source in dict.fromkeys(self._at[source] for source in read):
                last = next(one for one in reversed(read) if self._at[one] == source)
                self.arrows.append(Arrow(source, id, self.sizes.type(last.meta.get("val"))))
        for node in region.nodes:
            self._at[node] = id
            self.place[node.name] = id
            if node.op == "call_module":
                self.place[str(node.target)] = id

    def output(self, node: fx.Node) -> None:
        """A value that other parts read."""
        if symbolic(node):
            return
        name, type_ = self.told[node].name, self.sizes.type(node.meta.get("val"))
        self.boxes.append(Box(f"out {name}", "output", name, (type_,), rows=(f"{name}: {type_}",)))
        self.arrows.append(Arrow(self._at[node], f"out {name}", type_))

    def _box(self, program: Program, part: Part, region: Region) -> Box:
        root = region.root
        row = self.told.get(root) or next(r for n in region.nodes if (r := self.told.get(n)) is not None)
        said = tuple(self.told[node].line() for node in region.nodes if node in self.told)
        kind, title, lines = _what(program, row, region, self.sizes)
        scheme = root.meta.get("scheme")
        leaf = program.leaf(root)
        linear = leaf is not None and leaf.kind == "linear"
        return Box(
            id=row.name or f"{kind} {len(self.boxes)}",
            kind=kind,
            title=title,
            lines=lines,
            format=(str(scheme) if scheme is not None else row.note) if linear else "",
            bits=(16 if scheme is None else scheme.bits) if linear else 0,
            edits=row.edits,
            rows=said,
        )


def _what(program: Program, row: Row, region: Region, sizes: Sizes) -> tuple[Kind, str, tuple[str, ...]]:
    """Kind, title and lines of a box."""
    root, leaf = region.root, program.leaf(region.root)
    if row.op == "alike":
        return "alike", row.target, ()
    if row.op == "return":
        return "output", "return", ()
    if root.op == "placeholder":
        return "input", row.name, (row.type,)
    if leaf is not None:
        return leaf.kind, row.target, _facts(program, root)
    if is_attention(root):
        return "attention", "attention", _heads(root, sizes)
    if root.target in STUBS:
        return "stub", "int8 grid", (row.note,)
    if root.target in INSERTED:
        return "inserted", _inserted(root), (row.note.removeprefix("online "),)
    if root.op == "get_attr":
        return "op", row.target, (row.type,)
    return _ops(row, region)


def _facts(program: Program, node: fx.Node) -> tuple[str, ...]:
    leaf = program.leaves[str(node.target)]
    if leaf.norm is not None:
        what = "layer norm" if leaf.norm.mean_subtracting else "rms norm"
        return (f"{what}, {leaf.norm.width}" + (", gain one" if node.meta.get("unit") else ""),)
    weight = leaf.parameters.get("weight")
    if weight is None or len(weight) != 2:
        return ()
    out, width = reversed(weight) if leaf.transposed else weight
    if leaf.kind == "embedding":
        return (f"{weight[0]} × {weight[1]}",)
    return (f"{width} → {out}" + (", bias" if "bias" in leaf.parameters else ""),)


def _heads(node: fx.Node, sizes: Sizes) -> tuple[str, ...]:
    shapes = [arg.meta["val"].shape for arg in node.args[:2] if isinstance(arg, fx.Node)]
    if len(shapes) < 2 or any(len(shape) != 4 for shape in shapes):
        return ()
    (_, heads, _, width), (_, keys, *_) = shapes
    few = f", {sizes(keys)} of keys" if str(keys) != str(heads) else ""
    return (f"{sizes(heads)} heads of {sizes(width)}{few}",)


def _computed(node: fx.Node) -> str:
    """The op that computes a value, whatever views of it come after: ``cos``. Conditions are masks."""
    if getattr(node.meta.get("val"), "dtype", None) is torch.bool:
        return "mask"
    while node.op == "call_function" and node.target in THROUGH and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return op_name(node) if node.op == "call_function" else ""


def _inserted(node: fx.Node) -> str:
    if node.target is rotate:
        return "online rotation"
    return "online division" if node.target is divided else "low-rank branch"


def _ops(row: Row, region: Region) -> tuple[Kind, str, tuple[str, ...]]:
    ops = region.ops or (row.op,)
    if rotary(ops):
        return "op", "rotary embedding", ()
    names = list(dict.fromkeys(SYMBOLS.get(op, op) for op in ops))
    if len(names) == 1 and names[0] in SYMBOLS.values() and len(ops) == 1:
        return "join", names[0], ()
    if len(names) > MOST_OPS:
        return "op", f"{len(ops)} ops", (", ".join(names[:MOST_OPS]) + ", ...",)
    return "op", " ".join(names) if len(names) < 3 else ", ".join(names), ()
