"""Cut a graph into prologue, blocks and epilogue, each of which runs by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from .canon import aten, mutates, spell, symbolic
from .errors import Refused
from .program import Leaf, Part


def largest_list(model: nn.Module, least: int = 1) -> str:
    """Name of the ``nn.ModuleList`` of at least so many modules that owns most parameters; empty where there is none.

    What a model is made of is known from its graph (``find_blocks``); this is the guess before there is one.
    """
    lists = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) >= least
    ]
    return max(lists, default=(0, ""))[1]


def find_blocks(graph: fx.Graph, owner: nn.Module) -> tuple[str, ...]:
    """Names of the decoder blocks: the modules of the ``nn.ModuleList`` with most parameters, all of which ran.

    Without such a list, the siblings of one class with most parameters, in the order in which they ran.
    """
    ran: dict[str, None] = {}
    for node in graph.nodes:
        ran |= dict.fromkeys(str(name).partition("@")[0] for name in node.meta.get("stack", ()))
        if node.op == "call_module":
            ran[str(node.target)] = None
    lists: list[tuple[str, ...]] = []
    siblings: list[tuple[str, ...]] = []
    for name, module in owner.named_modules():
        children = {f"{name}.{key}" if name else key: child for key, child in module.named_children()}
        if isinstance(module, nn.ModuleList) and children and all(child in ran for child in children):
            lists.append(tuple(children))
        for kind in dict.fromkeys(type(child) for child in children.values()):
            alike = {
                n for n, child in children.items() if type(child) is kind and next(child.children(), None)
            }
            if len(alike) > 1 and alike <= ran.keys():
                siblings.append(tuple(n for n in ran if n in alike))
    if not lists and not siblings:
        raise Refused(
            "no stack of decoder blocks: the model runs no modules of one class one after another.\n"
            "qc compiles block by block; give it a decoder-only model that is made of blocks."
        )

    def size(names: tuple[str, ...]) -> int:
        return sum(p.numel() for n in names for p in owner.get_submodule(n).parameters())

    return max(lists or siblings, key=lambda names: (size(names), names))


def _output(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))


def assign(graph: fx.Graph, names: tuple[str, ...]) -> None:
    """Write ``meta["part"]`` on every node: 0 prologue, 1..count blocks, count + 1 epilogue.

    What runs between two blocks outside of both goes to the first; so does, after the last block, what runs
    after the one before it.
    """
    count = len(names)
    epilogue = count + 1
    strays: dict[int, list[object]] = {}
    blocks = {name: i + 1 for i, name in enumerate(names)}
    for node in graph.nodes:
        latest = max((source.meta["part"] for source in node.all_input_nodes), default=0)
        own = next((blocks[name] for name in node.meta.get("stack", ()) if name in blocks), None)
        if node.op == "output":
            part = epilogue
        elif node.op in ("placeholder", "get_attr") or symbolic(node):
            part = 0
        elif own is None:
            strays.setdefault(latest, []).append(node.target)
            after = strays.get(count - 1, [])
            joined = latest == count and strays[count] == after[: len(strays[count])]
            part = latest if latest < count or joined else epilogue
        else:
            part = own
        if part < latest and not symbolic(node):  # a size is found again wherever it is used
            raise _disordered(node, part, latest)
        node.meta["part"] = part


def _disordered(node: fx.Node, part: int, latest: int) -> Refused:
    return Refused(
        f"blocks do not run in order: {node.name} of part {part} reads a value of part {latest}.\n"
        "qc streams a model block by block and cannot hold this one."
    )


def regroup(graph: fx.Graph) -> fx.Graph:
    """The graph in order of parts, with parameters and sizes derived inside each part that uses them."""
    new = fx.Graph(owning_module=graph.owning_module)
    values: dict[fx.Node, fx.Node] = {}
    by_part: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        by_part.setdefault(node.meta["part"], []).append(node)
    by_part[0] = _by_use(by_part[0], [node for index in sorted(by_part) if index for node in by_part[index]])
    for index in sorted(by_part):
        _copy_part(new, index, by_part[index], values)
    return new


def _by_use(prologue: list[fx.Node], later: list[fx.Node]) -> list[fx.Node]:
    """The nodes of the prologue in the order in which later parts need them: code may go through a set of layer types,
    whose order is that of hashes. As they are where one of them writes into another."""
    if any(mutates(node) for node in prologue):
        return prologue
    inside = set(prologue)
    found = {node: None for node in prologue if node.op == "placeholder"}

    def visit(node: fx.Node) -> None:
        if node in inside and node not in found:
            for source in node.all_input_nodes:
                visit(source)
            found[node] = None

    for node in later:
        for source in node.all_input_nodes:
            visit(source)
    for node in prologue:
        visit(node)
    return list(found)


def _copy_part(new: fx.Graph, index: int, nodes: list[fx.Node], values: dict[fx.Node, fx.Node]) -> None:
    own = [n for n in nodes if n.op not in ("get_attr",) and not symbolic(n)]
    given = list(
        dict.fromkeys(
            source
            for node in own
            for source in node.all_input_nodes
            if source.meta["part"] != index and source.op != "get_attr" and not symbolic(source)
        )
    )
    given.sort(key=lambda n: -n.meta["part"])  # the hidden state before what the prologue made
    local: dict[fx.Node, fx.Node] = {}
    sizes: dict[str, fx.Node] = {}

    def carry(node: fx.Node) -> fx.Node:
        if node in local:
            return local[node]
        if node.op == "get_attr":
            copy = new.create_node("get_attr", str(node.target))
        elif symbolic(node):
            expr = str(node.meta["val"])
            if expr in sizes:
                return sizes[expr]
            copy = _size(expr) or new.node_copy(node, carry)
            sizes[expr] = copy
        elif node in values:
            return values[node]
        else:
            raise _disordered(node, index, node.meta["part"])
        copy.meta = {**node.meta, "part": index}
        local[node] = copy
        return copy

    def _size(expr: str) -> fx.Node | None:
        for source in (*given, *(n for n in own if n.op == "placeholder")):
            val = source.meta["val"]
            for dim, size in enumerate(val.shape if isinstance(val, Tensor) else ()):
                if isinstance(size, torch.SymInt) and str(size) == expr:
                    return new.call_function(aten.sym_size.int, (values[source], dim))
        return None

    for node in own:
        copy = new.node_copy(node, carry)
        copy.meta = dict(node.meta)
        values[node] = copy


def block_text(graph: fx.Graph, index: int, prefix: str, leaves: Mapping[str, Leaf]) -> str:
    """Text of one block, equal for blocks that compute the same: local numbering, prefix taken off.

    Values from outside are numbered by first use, so which prologue value feeds which input is not part of
    it.
    """
    spelled: dict[fx.Node, str] = {}
    lines: list[str] = []
    inputs = 0
    for node in graph.nodes:
        if node.meta["part"] != index:
            continue
        for source in node.all_input_nodes:
            if source not in spelled:
                spelled[source] = f"in{inputs}"
                inputs += 1
        target = (
            str(node.target).removeprefix(prefix + ".") if node.op != "call_function" else str(node.target)
        )
        if leaf := leaves.get(str(node.target)) if node.op == "call_module" else None:
            target += f" {leaf.kind} {dict(leaf.parameters)} {leaf.norm} {leaf.transposed}"
        args = ", ".join(spell(a, spelled) for a in node.args)
        kwargs = "".join(f", {k}={spell(v, spelled)}" for k, v in node.kwargs.items())
        spelled[node] = f"v{len(lines)}"
        lines.append(f"{spelled[node]} = {node.op} {target}({args}{kwargs})")
    return "\n".join(lines)


def split(graph: fx.Graph, owner: nn.Module, leaves: Mapping[str, Leaf]) -> tuple[fx.Graph, tuple[Part, ...]]:
    """The graph cut into parts: nodes carry ``meta["part"]`` and stand in order of parts.

    Raises Refused where no stack of blocks is found or where blocks do not run one after another.
    """
    names = find_blocks(graph, owner)
    assign(graph, names)
    graph = regroup(graph)
    kinds: dict[str, int] = {}
    parts = [Part("prologue", 0, -1)]
    for i, name in enumerate(names):
        text = block_text(graph, i + 1, name, leaves)
        parts.append(Part(name, i + 1, kinds.setdefault(text, len(kinds))))
    parts.append(Part("epilogue", len(names) + 1, -1))
    return graph, tuple(parts)


def skips(graph: fx.Graph, parts: tuple[Part, ...]) -> list[str]:
    """Values that a block reads from an earlier block than the one before it, in words."""
    names = {part.index: part.name for part in parts}
    found = []
    for node in graph.nodes:
        for source in node.all_input_nodes:
            origin, here = source.meta["part"], node.meta["part"]
            if 0 < origin < here - 1:
                found.append(f"{names[here]} reads a value of {names[origin]}")
    return sorted(set(found))
