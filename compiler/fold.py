"""Fold the ops of each leaf module into one ``call_module`` node, where exporting that leaf alone agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .canon import aten, canonical, hint, sweep, symbolic, text_of
from .export_module import export_graph
from .probe import kind_of
from .program import Leaf

REDUCTIONS = frozenset(
    {"mean", "layer_norm", "rms_norm", "var", "var_mean", "linalg_vector_norm", "norm", "sum"}
)


@dataclass(frozen=True)
class Stretch:
    """The nodes of one call of one leaf, its only input and its only result."""

    name: str
    nodes: tuple[fx.Node, ...]
    given: fx.Node
    result: fx.Node


def _leaves(owner: nn.Module) -> dict[str, nn.Module]:
    """Modules without children, by every name under which they are reachable."""
    return {
        name: module
        for name, module in owner.named_modules(remove_duplicate=False)
        if name and next(module.children(), None) is None
    }


def _local(name: str, module: nn.Module, owner: nn.Module) -> dict[str, str]:
    """Names by which the graph may know the tensors of a leaf, mapped to their local names."""
    mine = dict(module.named_parameters()) | dict(module.named_buffers())
    by_id = {id(tensor): local for local, tensor in mine.items()}
    found = {f"{name}.{local}": local for local in mine}
    for qualified, tensor in owner.named_parameters(remove_duplicate=False):
        if id(tensor) in by_id:
            found[qualified] = by_id[id(tensor)]
    return found


def _boundary(nodes: list[fx.Node], names: Mapping[str, str]) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """Tensors that enter and leave a set of nodes; None where it reads a tensor that is not its own."""
    inside, given, results = set(nodes), [], []
    for node in nodes:
        for source in node.all_input_nodes:
            if source in inside or symbolic(source):
                continue
            if source.op == "get_attr":
                if source.target not in names:
                    return None
            elif source not in given:
                given.append(source)
        if not symbolic(node) and any(user not in inside for user in node.users):
            results.append(node)
    return given, results


def leaf_graph(
    nodes: list[fx.Node], given: fx.Node, result: fx.Node, names: Mapping[str, str]
) -> fx.Graph | None:
    """The leaf's own graph: one placeholder ``x``, local names, sizes of ``x``; None if it has others."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {given: graph.placeholder("x")}
    new[given].meta["val"] = given.meta["val"]
    shape = given.meta["val"].shape

    def carry(node: fx.Node) -> fx.Node:
        if node in new:
            return new[node]
        if node.op == "get_attr":
            copy = graph.get_attr(names[str(node.target)])
        elif symbolic(node):
            expr = str(node.meta["val"])
            dim = next((i for i, size in enumerate(shape) if str(size) == expr), None)
            if dim is not None:
                copy = graph.call_function(aten.sym_size.int, (new[given], dim))
            elif node.op == "call_function" and node.target is not aten.sym_size.int:
                copy = graph.node_copy(node, carry)
            else:
                raise LookupError(expr)
        else:
            copy = graph.node_copy(node, carry)
        copy.meta = {"val": node.meta["val"]}
        new[node] = copy
        return copy

    try:
        for node in nodes:
            if not symbolic(node):
                carry(node)
    except LookupError:
        return None
    graph.output(new[result])
    sweep(graph)
    return graph


def _example(val: Tensor) -> tuple[Tensor, dict[int, Any]]:
    """A meta tensor of the hinted size, and which of its axes are dynamic."""
    dynamic = {i: torch.export.Dim.AUTO for i, d in enumerate(val.shape) if isinstance(d, torch.SymInt)}
    return torch.empty([hint(d) for d in val.shape], dtype=val.dtype, device="meta"), dynamic


def retraces(module: nn.Module, graph: fx.Graph) -> bool:
    """Whether exporting the leaf alone with one input gives the ops of ``graph``."""
    (given,) = (n for n in graph.nodes if n.op == "placeholder")
    example, dynamic = _example(given.meta["val"])
    try:
        exported = export_graph(module, (example,), (dynamic,))
    except Exception:
        return False  # a leaf that cannot run alone on its input is not a function of that input
    alone, made = canonical(exported, "", module)
    if made:
        return False
    nodes = [n for n in alone.nodes if n.op == "call_function"]
    given = next(n for n in alone.nodes if n.op == "placeholder")
    result = next(iter(reversed(alone.nodes))).args[0]
    names = {str(n.target): str(n.target) for n in alone.nodes if n.op == "get_attr"}
    if not isinstance(result, fx.Node):
        return False
    local = leaf_graph(nodes, given, result, names)
    return local is not None and text_of(local) == text_of(graph)


def fold(graph: fx.Graph, owner: nn.Module) -> tuple[dict[str, Leaf], list[str]]:
    """Fold leaves in place. Returns leaves by qualified name, and notes on leaves that were left unfolded.

    A leaf folds if its ops have one tensor input and one result and are what exporting it alone gives.
    Modules without parameters stay inline, so that activations are visible, unless they are norms.
    """
    modules = _leaves(owner)
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        stack = node.meta.get("stack") or ("",)
        if node.op == "call_function" and stack[-1].split("@")[0] in modules:
            calls.setdefault(stack[-1], []).append(node)
    leaves: dict[str, Leaf] = {}
    notes: list[str] = []
    verdicts: dict[tuple, bool] = {}
    kinds: dict[tuple, tuple] = {}
    for call, nodes in calls.items():
        name = call.split("@")[0]
        module = modules[name]
        parameters = {n: tuple(p.shape) for n, p in module.named_parameters()}
        plain = not parameters
        if plain and not any(word in str(n.target) for n in nodes for word in REDUCTIONS):
            continue
        names = _local(name, module, owner)
        core = _embedding_core(nodes, names)
        stretch = core or nodes
        boundary = _boundary(stretch, names)
        local = None
        if boundary and len(boundary[0]) == 1 and len(boundary[1]) == 1:
            local = leaf_graph(stretch, boundary[0][0], boundary[1][0], names)
        if local is None or boundary is None:
            if not plain:
                notes.append(f"{name} is left unfolded: it is not a function of one tensor to one tensor")
            continue
        text = text_of(local)
        declared = str([(n, str(p.dtype)) for n, p in module.named_parameters()])
        key = (type(module), tuple(sorted(parameters.items())), declared, str(local_rank(local)), text)
        if key not in verdicts:
            verdicts[key] = core is not None or retraces(module, local)
            kinds[key] = kind_of(local, parameters) if verdicts[key] else ("opaque", None, False)
        kind, norm, transposed = kinds[key]
        if not verdicts[key]:
            if not plain:
                notes.append(f"{name} is left unfolded: exported alone it does not give the same ops")
            continue
        if plain and kind != "norm":
            continue
        leaves[name] = Leaf(kind, local, parameters, norm, transposed)
        replace_by_call(graph, stretch, boundary[0][0], boundary[1][0], name, call)
    sweep(graph)
    return leaves, notes


def local_rank(graph: fx.Graph) -> tuple[int, ...]:
    """Ranks of a leaf's inputs: one text may mean two things for inputs of different rank."""
    return tuple(n.meta["val"].ndim for n in graph.nodes if n.op == "placeholder")


def _embedding_core(nodes: list[fx.Node], names: Mapping[str, str]) -> list[fx.Node] | None:
    """The lookup alone, for a leaf that computes more than the rows it looks up; the rest stays inline."""
    lookups = [n for n in nodes if n.target is aten.embedding.default]
    if len(lookups) != 1 or sum(not symbolic(n) for n in nodes) == 1:
        return None
    table = lookups[0].args[0]
    own = isinstance(table, fx.Node) and table.op == "get_attr" and names.get(str(table.target)) == "weight"
    return lookups if own else None


def replace_by_call(
    graph: fx.Graph, nodes: list[fx.Node], given: fx.Node, result: fx.Node, name: str, call: str
) -> None:
    """Put one call_module node in the place of a leaf's ops."""
    with graph.inserting_after(result):
        node = graph.create_node("call_module", name, (given,))
    stack = result.meta.get("stack", ())
    node.meta = {"val": result.meta["val"], "stack": stack, "module": call}
    result.replace_all_uses_with(node)
    for old in reversed(nodes):
        if not old.users:
            graph.erase_node(old)
