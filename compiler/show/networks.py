"""A program as a networkx graph, for people who want to compute on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from ..canon import symbolic
from ..program import Program
from .regions import INSERTED, STUBS
from .rows import Sizes, rows

if TYPE_CHECKING:
    import networkx


def to_networkx(program: Program) -> networkx.DiGraph:
    """The values of a program as nodes, an edge from each to those that read it. Every expert is there.

    A node is called by its name in the FX graph. Its attributes: ``part`` (``prologue``, ``model.layers.0``, ...),
    ``row`` (``v28``, its name in the text of the part, empty where it has no row), ``op`` (``linear``, ``attention``,
    ``add``, ...), ``target`` (the module or parameter, qualified; empty for an op), ``type`` (``bf16[b, s, 576]``),
    ``format`` (``W8A8``; empty where float), ``bits`` (of a linear's weight, 16 where float, 0 for what is no linear),
    ``edits`` (what passes did to its weights, joined by ``; ``), ``note``, and ``inserted`` (whether a pass put it
    there). An edge has ``operands``: the places among the inputs of its reader, joined by commas. The graph has
    ``title``. All values are strings, integers and booleans, so that every writer of networkx takes them.
    """
    import networkx

    sizes = Sizes(program)
    graph = networkx.DiGraph(title=program.title)
    told = {row.node: row for part in program.parts for row in rows(program, part, sizes)}
    names = {part.index: part.name for part in program.parts}
    for node in program.graph.nodes:
        if symbolic(node):
            continue
        row, leaf, scheme = told.get(node), program.leaf(node), node.meta.get("scheme")
        linear = leaf is not None and leaf.kind == "linear"
        graph.add_node(
            node.name,
            part=names[node.meta["part"]],
            row=row.name if row else "",
            op=row.op if row and row.op != "alike" else leaf.kind if leaf else _op(node),
            target=str(node.target) if node.op in ("call_module", "get_attr") else "",
            type=sizes.type(node.meta.get("val")),
            format=str(scheme) if scheme is not None and linear else "",
            bits=(16 if scheme is None else scheme.bits) if linear else 0,
            edits="; ".join(node.meta.get("edits", ())),
            note=str(node.meta.get("note", "")),
            inserted=node.target in (*INSERTED, *STUBS),
        )
        places: dict[fx.Node, list[str]] = {}
        for place, source in enumerate(_inputs(node)):
            places.setdefault(source, []).append(str(place))
        for source, at in places.items():
            if not symbolic(source):
                graph.add_edge(source.name, node.name, operands=",".join(at))
    return graph


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments of a node, in order, one that is read twice (``x * x``) twice."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _op(node: fx.Node) -> str:
    target: Any = node.target
    return str(getattr(target, "_opname", getattr(target, "__name__", target)))
