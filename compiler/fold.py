"""Fold the ops of each leaf module into one ``call_module`` node, where exporting that leaf alone agrees."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .canon import aten, canonical, cast_dtype, hint, sweep, symbolic, text_of
from .export_module import export_graph
from .probe import kind_of
from .program import Leaf

REDUCTIONS = frozenset(
    {"mean", "layer_norm", "rms_norm", "var", "var_mean", "linalg_vector_norm", "norm", "sum"}
)


@dataclass(frozen=True)
class Stretch:
    """The nodes of one call of one leaf, its only input, its only result, and its own graph."""

    nodes: list[fx.Node]
    given: fx.Node
    result: fx.Node
    graph: fx.Graph
    certain: bool
    """Whether it is one op, which needs no comparison with an export."""
    partial: bool
    """Whether the leaf computes more than this."""

    def key(self, module: nn.Module) -> tuple:
        """Equal for calls that fold alike: rank of the input, text, and what the module is and holds."""
        held = tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters())
        return type(module), held, self.given.meta["val"].ndim, text_of(self.graph)

    def leaf(self, module: nn.Module) -> Leaf | None:
        """The leaf that the call runs, or None where the module exported alone is something else."""
        if not self.certain and not retraces(module, self.graph):
            return None
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        parameters = {name: tuple(p.shape) for name, p in module.named_parameters() if name in used}
        kind, norm, transposed = kind_of(self.graph, parameters)
        return Leaf(kind, self.graph, parameters, norm, transposed, partial=self.partial)


def _stretch(nodes: list[fx.Node], names: Mapping[str, str], whole: bool) -> Stretch | None:
    """What of a leaf's nodes can fold: all of them if ``whole``, or the lookup or linear of one that computes more."""
    core = _embedding_core(nodes, names) or _linear_core(nodes, names, whole)
    if core is None and not whole:
        return None
    boundary = _boundary(core or nodes, names)
    if boundary is None or len(boundary[0]) != 1 or len(boundary[1]) != 1:
        return None
    (given,), (result,) = boundary
    graph = leaf_graph(core or nodes, given, result, names)
    if graph is None:
        return None
    more = not whole or (core is not None and len(core) < sum(not symbolic(n) for n in nodes))
    return Stretch(core or nodes, given, result, graph, core is not None, more)


def _leaves(owner: nn.Module) -> dict[str, nn.Module]:
    """Modules without children, or with a weight of their own beside them, by every name that reaches them."""
    return {
        name: module
        for name, module in owner.named_modules(remove_duplicate=False)
        if name and (_childless(module) or "weight" in module._parameters)
    }


def _childless(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _aliases(owner: nn.Module) -> dict[int, list[str]]:
    """All qualified names of each parameter, by identity."""
    found: dict[int, list[str]] = {}
    for name, parameter in owner.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def _local(name: str, module: nn.Module, aliases: Mapping[int, list[str]]) -> dict[str, str]:
    """Names by which the graph may know the tensors of a leaf, mapped to their local names."""
    found: dict[str, str] = {}
    for local, tensor in (*module.named_parameters(), *module.named_buffers()):
        found |= dict.fromkeys((f"{name}.{local}", *aliases.get(id(tensor), ())), local)
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
    modules, aliases = _leaves(owner), _aliases(owner)
    leaves: dict[str, Leaf] = {}
    unfolded: dict[str, list[str]] = {}
    known: dict[tuple, Leaf | None] = {}
    for call, nodes in _calls(graph, modules):
        name = call.split("@")[0]
        module = modules[name]
        plain = next(module.parameters(), None) is None
        if plain and not any(word in str(n.target) for n in nodes for word in REDUCTIONS):
            continue
        stretch = _stretch(nodes, _local(name, module, aliases), _childless(module))
        if stretch is None:
            if not plain:
                unfolded.setdefault("not a function of one tensor to one tensor", []).append(name)
            continue
        key = stretch.key(module)
        if key not in known:
            known[key] = stretch.leaf(module)
        leaf = known[key]
        if leaf is None or leaves.get(name, leaf) is not leaf:
            if not plain:
                unfolded.setdefault("exported alone it does not give the same ops", []).append(name)
        elif leaf.kind == "norm" or not plain:
            leaves[name] = leaf
            replace_by_call(graph, stretch, name, call)
    sweep(graph)
    return leaves, [f"left unfolded, {why}: {_listed(names)}" for why, names in unfolded.items()]


def _calls(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[tuple[str, list[fx.Node]]]:
    """The nodes of every call of a leaf; they stand together, so what another module runs ends a call."""
    calls: list[tuple[str, list[fx.Node]]] = []
    running = ""
    for node in graph.nodes:
        if node.op != "call_function" or symbolic(node):
            continue
        call = (node.meta.get("stack") or ("",))[-1]
        if call.split("@")[0] in modules:
            if call != running:
                calls.append((call, []))
            calls[-1][1].append(node)
        running = call
    return calls


def _listed(names: list[str]) -> str:
    """Names with their layer numbers taken out, and how many each pattern stands for."""
    counts = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
    return ", ".join(f"{name} ({n})" if "*" in name else name for name, n in counts.items())


def _embedding_core(nodes: list[fx.Node], names: Mapping[str, str]) -> list[fx.Node] | None:
    """The lookup alone; what else a leaf computes, before or after it, stays inline."""
    lookups = [n for n in nodes if n.target is aten.embedding.default]
    if len(lookups) != 1:
        return None
    table = lookups[0].args[0]
    own = isinstance(table, fx.Node) and table.op == "get_attr" and names.get(str(table.target)) == "weight"
    return lookups if own else None


def _linear_core(nodes: list[fx.Node], names: Mapping[str, str], whole: bool) -> list[fx.Node] | None:
    """The linear alone, with the casts of its weight, for a leaf that computes more (a router of experts)."""
    linears = [n for n in nodes if n.target is aten.linear.default]
    if len(linears) != 1 or (whole and sum(not symbolic(n) for n in nodes) == 1):
        return None
    core = [linears[0]]
    for role, operand in zip(("weight", "bias"), linears[0].args[1:], strict=False):
        while isinstance(operand, fx.Node) and cast_dtype(operand) is not None:
            core.insert(0, operand)
            operand = operand.args[0]
        own = isinstance(operand, fx.Node) and operand.op == "get_attr"
        if operand is not None and not (own and names.get(str(operand.target)) == role):
            return None
    return core


def replace_by_call(graph: fx.Graph, stretch: Stretch, name: str, call: str) -> None:
    """Put one call_module node in the place of a leaf's ops."""
    result = stretch.result
    with graph.inserting_after(result):
        node = graph.create_node("call_module", name, (stretch.given,))
    node.meta = {"val": result.meta["val"], "stack": result.meta.get("stack", ()), "module": call}
    result.replace_all_uses_with(node)
    for old in reversed(stretch.nodes):
        if not old.users:
            graph.erase_node(old)
