"""Canonical graphs: what an export leaves behind that carries no meaning is taken away, the rest is named.

The result has call_functions over aten, get_attr nodes with the model's own qualified names, and on every
node ``meta["val"]`` (a fake tensor or a symbolic integer), ``meta["module"]`` (the deepest module that ran
it) and ``meta["stack"]`` (all modules that were running, outermost first; a repeated call of a module has a
suffix ``@n``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten
WHOLE = 2**63 - 1
"""The end of a slice that takes everything."""

DROPPED = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)
"""Assertions over what was traced: about the device meta, or about shapes."""

ALIASES = frozenset({"alias", "detach", "detach_", "lift_fresh", "lift_fresh_copy"})
CASTS = frozenset({"to", "_to_copy", "type_as"})


def op_name(node: fx.Node) -> str:
    """Name of the aten op that a node calls, without overload; empty for other nodes."""
    target = node.target
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else ""


def mutates(node: fx.Node) -> bool:
    """Whether the node writes into one of its operands. Such a node is never dead code."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def symbolic(node: fx.Node) -> bool:
    """Whether the node's value is a number derived from shapes rather than a tensor."""
    return isinstance(
        node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool
    )


def hint(size: int | torch.SymInt) -> int:
    """The size with which a model was traced, without tying the symbol to it (which ``int`` would).

    Raises:
        ValueError: The size depends on the values of tensors.
    """
    if isinstance(size, int):
        return size
    if size.node.hint is None:
        raise ValueError(f"the size {size} of a tensor depends on the values of tensors")
    return int(size.node.hint)


def cast_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype to which a cast node casts, or None where the node is no cast."""
    if op_name(node) not in CASTS:
        return None
    dtypes = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)]
    return dtypes[0] if dtypes else node.meta["val"].dtype


def identity(node: fx.Node) -> fx.Node | None:
    """The operand that a node returns unchanged, or None where it computes something."""
    args: list[Any] = list(node.args)
    source = args[0] if args and isinstance(args[0], fx.Node) else None
    if source is None or not isinstance(source.meta.get("val"), Tensor):
        return None
    name, val, given = op_name(node), node.meta.get("val"), source.meta["val"]
    if name in ALIASES:
        return source
    if name == "slice" and len(args) >= 4 and args[2] in (0, None) and args[3] == WHOLE:
        return source if len(args) < 5 or args[4] == 1 else None
    if name in ("dropout", "feature_dropout") and (args[1] == 0 or args[2] is False):
        return source
    if not isinstance(val, Tensor) or val.dtype != given.dtype or val.ndim != given.ndim:
        return None
    if name in CASTS and True not in args and not node.kwargs.get("copy"):
        return source
    if name == "add" and not val.is_floating_point() and args[1:] == [0]:
        return source
    if name in ("mul", "div") and type(args[1]) in (int, float) and args[1] == 1:
        return source
    return None


def _plain_cast(graph: fx.Graph, node: fx.Node) -> None:
    """Turn every spelling of a cast into ``aten.to.dtype(x, dtype)``; the executor chooses the device."""
    dtype = cast_dtype(node)
    if dtype is None:
        return
    node.target = aten.to.dtype
    node.args = (node.args[0], dtype)
    node.kwargs = {}


def _plain_lookup(node: fx.Node) -> None:
    """Turn ``table[ids]``, rows of a parameter or buffer [n, channels], into ``aten.embedding(table, ids)``."""
    if node.target is not aten.index.Tensor:
        return
    table, index = node.args
    if not isinstance(table, fx.Node) or table.op != "get_attr" or table.meta["val"].ndim != 2:
        return
    if not isinstance(index, list | tuple) or len(index) != 1 or not isinstance(index[0], fx.Node):
        return
    if index[0].meta["val"].dtype in (torch.int64, torch.int32):
        node.target, node.args = aten.embedding.default, (table, index[0])


def _module_stack(node: fx.Node, strip: Callable[[str], str]) -> tuple[str, ...]:
    """Qualified names of the modules that were running, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    names = []
    for key, (path, _) in stack.items():
        if not isinstance(path, str) or key.startswith("_empty_nn_module_stack"):
            continue
        name = strip(path)
        if name:
            names.append(name)
    return tuple(names)


def canonical(module: fx.GraphModule, prefix: str, owner: nn.Module) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The canonical graph of an exported module, and the tensors that tracing made itself.

    ``prefix`` is what the wrapper put before the model's own names; ``owner`` is the model, which
    call_module and get_attr targets name. The tensors are those that are neither parameters nor buffers of
    the model.
    """
    names = {name for name, _ in owner.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in owner.named_buffers(remove_duplicate=False)}

    def strip(path: str) -> str:
        return path[len(prefix) :] if prefix and path.startswith(prefix) else ("" if prefix else path)

    graph = fx.Graph(owning_module=owner)  # pyright: ignore[reportArgumentType]
    made: dict[str, Tensor] = {}
    new: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and op_name(node) in DROPPED:
            continue
        if node.op == "get_attr":
            if not node.users:
                continue
            tensor = operator.attrgetter(str(node.target))(module)
            name = strip(str(node.target))
            if name not in names:
                name = f"constant_{len(made)}"
                made[name] = tensor
            copy = graph.get_attr(name) if name in names else graph.create_node("get_attr", name)
            copy.meta = {"val": tensor, "stack": (), "module": ""}
            new[node] = copy
            continue
        copy = graph.node_copy(node, lambda n: new[n])
        stack = _module_stack(node, strip)
        copy.meta = {"stack": stack, "module": stack[-1] if stack else ""}
        if "val" in node.meta:
            copy.meta["val"] = node.meta["val"]
        new[node] = copy
        if copy.op == "call_function":
            same = identity(copy)
            if same is not None:
                new[node] = same
                graph.erase_node(copy)
                continue
            _plain_cast(graph, copy)
            _plain_lookup(copy)
            if "device" in copy.kwargs:
                copy.kwargs = {**copy.kwargs, "device": torch.device("cpu")}
    output = next(iter(reversed(graph.nodes)))
    (result,) = output.args
    while isinstance(result, list | tuple):
        result = result[0]
    output.args = (result,)
    sweep(graph)
    return graph, made


def sweep(graph: fx.Graph) -> None:
    """Erase nodes that nobody reads, save placeholders, the output and whatever writes into an operand."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not mutates(node):
            graph.erase_node(node)


def text_of(graph: fx.Graph, name: Callable[[fx.Node], Any] | None = None) -> str:
    """Text of a graph with local numbering, equal for equal computations.

    Sizes are written where they are used, placeholders by position; ``name`` says how a node's target is
    written where it is not the target itself.
    """
    spelled: dict[fx.Node, str] = {}
    lines: list[str] = []
    inputs = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            spelled[node] = f"in{inputs}"
            inputs += 1
            continue
        target = str((name(node) if name else None) or node.target)
        args = ", ".join(
            [spell(a, spelled) for a in node.args]
            + [f"{k}={spell(v, spelled)}" for k, v in node.kwargs.items()]
        )
        if node.op == "output":
            lines.append(f"return {args}")
        elif node.op == "get_attr":
            spelled[node] = f"@{target}"
        elif symbolic(node):
            spelled[node] = f"{target}({args})"
        else:
            spelled[node] = f"v{len(lines)}"
            lines.append(f"{spelled[node]} = {target}({args})")
    return "\n".join(lines)


def spell(value: Any, spelled: dict[fx.Node, str]) -> str:
    """Text of an argument in which nodes are written as ``spelled`` says."""
    if isinstance(value, fx.Node):
        return spelled.get(value, value.name)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(spell(v, spelled) for v in value) + "]"
    return str(value)
