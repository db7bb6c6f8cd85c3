"""Trace one layer of each kind: the layers like it leave a mark each, and marks are expanded afterwards.

Two layers are alike if their modules have the same types, the same attributes and parameters of the same
shapes. An integer that differs (the index of a layer in its stack) is hidden while the layer that stands for
the others is traced: code that looks at it is found out, and the model is then traced in full.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .blocks import largest_list
from .canon import symbolic


class Unalike(Exception):
    """Layers that look alike do not run alike; the model has to be traced in full."""


@torch.library.custom_op("qc::enter", mutates_args=())
def enter(xs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a traced layer was called with; stands in graphs under construction only."""
    return [x.clone() for x in xs]


@torch.library.custom_op("qc::alike", mutates_args=())
def alike(xs: Sequence[Tensor]) -> Tensor:
    """A layer like one that was traced, called with ``xs``; stands in graphs under construction only."""
    return xs[0].clone()


def _like(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape, x.stride())


ENTER = torch.ops.qc.enter.default
ALIKE = torch.ops.qc.alike.default


@enter.register_fake
def _(xs):
    return [_like(x) for x in xs]


@alike.register_fake
def _(xs):
    return _like(xs[0])


def _read(*_: object) -> Any:
    raise Unalike("a layer looks at its own index while it runs")


_READS = """
    __index__ __int__ __float__ __bool__ __hash__ __str__ __repr__ __format__ __call__ __getattr__
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __neg__ __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__
    __mod__ __rmod__ __floordiv__ __rfloordiv__ __truediv__ __rtruediv__
    __pow__ __rpow__ __and__ __or__ __xor__
"""
_Hidden = type("_Hidden", (), dict.fromkeys(_READS.split(), _read))
"""A number that nobody may look at."""

_OWN = frozenset({"_parameters", "_buffers", "_modules", "forward"})


@dataclass
class Kind:
    """Layers that are alike, the first of which is traced."""

    first: int
    hidden: set[tuple[str, str]] = field(default_factory=set)
    """(module inside the layer, attribute) of integers that differ among the layers."""
    leaves: list[Any] | None = None
    """Arguments of the first layer that are no tensors."""
    tree: Any = None
    result: Any = None


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, str | int | float | bool | bytes | torch.dtype | torch.device):
        return a == b
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, set | frozenset):
        return a == b
    if isinstance(a, functools.partial):
        return a.func is b.func and _same(a.args, b.args) and _same(a.keywords, b.keywords)
    return False


def _differences(a: nn.Module, b: nn.Module) -> set[tuple[str, str]] | None:
    """Integers in which two layers differ; None where they differ in anything else."""
    found: set[tuple[str, str]] = set()
    left, right = dict(a.named_modules()), dict(b.named_modules())
    if left.keys() != right.keys():
        return None
    for name, module in left.items():
        other = right[name]
        if type(module) is not type(other):
            return None
        for mine, its in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
            if [(k, t if t is None else (t.shape, t.dtype)) for k, t in mine.items()] != [
                (k, t if t is None else (t.shape, t.dtype)) for k, t in its.items()
            ]:
                return None
        mine, its = vars(module), vars(other)
        if mine.keys() - _OWN != its.keys() - _OWN:
            return None
        for key in mine.keys() - _OWN:
            if not _same(mine[key], its[key]):
                if type(mine[key]) is not int or type(its[key]) is not int:
                    return None
                found.add((name, key))
    return found


def kinds_of(layers: Sequence[nn.Module]) -> list[Kind]:
    """The kind of each layer; layers that are alike have the same one."""
    kinds: list[Kind] = []
    found: list[Kind] = []
    for i, layer in enumerate(layers):
        for kind in kinds:
            differing = _differences(layers[kind.first], layer)
            if differing is not None:
                kind.hidden |= differing
                break
        else:
            kind = Kind(i)
            kinds.append(kind)
        found.append(kind)
    return found


@contextlib.contextmanager
def marked(model: nn.Module) -> Iterator[str | None]:
    """In this context the layers of the model's stack mark themselves when they are called.

    Yields the name of the stack, or None where the model has none.
    """
    name = largest_list(model, least=3)
    if not name:
        yield None
        return
    layers = list(model.get_submodule(name).children())
    saved: list[tuple[nn.Module, str, int]] = []
    try:
        for i, (layer, kind) in enumerate(zip(layers, kinds_of(layers), strict=True)):
            layer.forward = _first(layer, kind) if i == kind.first else _other(kind)
            if i == kind.first:
                for inner, key in kind.hidden:
                    module = layer.get_submodule(inner)
                    saved.append((module, key, getattr(module, key)))
        for module, key, _ in saved:
            object.__setattr__(module, key, _Hidden())
        yield name
    finally:
        for module, key, value in saved:
            object.__setattr__(module, key, value)
        for layer in layers:
            vars(layer).pop("forward", None)


def _split(args: tuple, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Any], Any]:
    leaves, tree = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    return tensors, [None if isinstance(x, Tensor) else (x,) for x in leaves], tree


def _first(layer: nn.Module, kind: Kind) -> Any:
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors, leaves, tree = _split(args, kwargs)
        if kind.leaves is not None or not tensors:
            raise Unalike("a layer is called twice, or without a tensor")
        kind.leaves, kind.tree = leaves, tree
        entered = iter(ENTER(tensors))
        given = [next(entered) if x is None else x[0] for x in leaves]
        args, kwargs = pytree.tree_unflatten(given, tree)
        kind.result = own(*args, **kwargs)
        results = [x for x in pytree.tree_leaves(kind.result) if x is not None]
        if len(results) != 1 or not isinstance(results[0], Tensor) or not _alike(results[0], tensors[0]):
            raise Unalike("a layer has results beside the hidden state")
        return kind.result

    return forward


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and [str(x) for x in a.shape] == [str(x) for x in b.shape]


def _other(kind: Kind) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors, leaves, tree = _split(args, kwargs)
        if kind.leaves is None or tree != kind.tree or not all(map(_same, leaves, kind.leaves)):
            raise Unalike("a layer is called in another way than one that is like it")
        hidden = ALIKE(tensors)
        return pytree.tree_map(lambda x: hidden if isinstance(x, Tensor) else x, kind.result)

    return forward


def expand(graph: fx.Graph, stack: str, model: nn.Module) -> fx.Graph:
    """The graph with every mark replaced by what the layer that was traced for it does.

    Raises:
        Unalike: A layer that was traced uses a tensor of its own under another name.
    """
    layers = list(model.get_submodule(stack).children())
    kinds = kinds_of(layers)
    bodies: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        index = _layer(node, stack)
        if index is not None and node.target not in (ENTER, ALIKE):
            bodies.setdefault(index, []).append(node)
    new = fx.Graph(owning_module=graph.owning_module)
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.target is ENTER:
            continue
        if entry := _entry(node):
            values[node] = values[_operand(entry, node)]
        elif node.target is ALIKE:
            index = _layer(node, stack)
            if index is None:
                raise Unalike("a layer runs outside the stack")
            first = kinds[index].first
            copied = _Copy(f"{stack}.{first}", f"{stack}.{index}", _tensors(layers[first]), model)
            values[node] = copied.of(new, bodies.get(first, []), node, values)
        else:
            values[node] = new.node_copy(node, lambda n: values[n])
            values[node].meta = dict(node.meta)
    return new


def _tensors(module: nn.Module) -> set[int]:
    return {id(t) for t in (*module.parameters(), *module.buffers())}


def _layer(node: fx.Node, stack: str) -> int | None:
    for name in node.meta.get("stack", ()):
        rest = name.removeprefix(stack + ".")
        if rest != name and rest.isdigit():
            return int(rest)
    return None


def _entry(node: fx.Node) -> fx.Node | None:
    """The mark of the traced layer of which a node is an operand."""
    source = node.args[0] if node.target is operator.getitem else None
    return source if isinstance(source, fx.Node) and source.target is ENTER else None


def _operand(mark: fx.Node, operand: fx.Node) -> fx.Node:
    """The value that a mark has where a traced layer has ``operand``."""
    tensors, position = mark.args[0], operand.args[1]
    assert isinstance(tensors, list | tuple)
    assert isinstance(position, int)
    found = tensors[position]
    assert isinstance(found, fx.Node)
    return found


@dataclass(frozen=True)
class _Copy:
    """A traced layer under another name."""

    old: str
    now: str
    own: set[int]
    """Identities of the tensors of the traced layer."""
    model: nn.Module

    def rename(self, name: str) -> str:
        """A qualified name inside the traced layer, as it is in the other; any other name unchanged."""
        inside = name == self.old or name.startswith(self.old + ".")
        return self.now + name[len(self.old) :] if inside else name

    def attribute(self, new: fx.Graph, node: fx.Node) -> fx.Node:
        """A parameter or buffer for the other layer."""
        name = str(node.target)
        if self.rename(name) == name and id(operator.attrgetter(name)(self.model)) in self.own:
            raise Unalike(f"a layer shares {name} with another module")
        copy = new.create_node("get_attr", self.rename(name))
        copy.meta = dict(node.meta)
        return copy

    def of(
        self, new: fx.Graph, body: list[fx.Node], mark: fx.Node, values: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        """Copy the traced layer's nodes onto the operands of a mark; returns the result."""
        local: dict[fx.Node, fx.Node] = {}
        inside = set(body)

        def carry(node: fx.Node) -> fx.Node:
            if node.op == "get_attr" and node not in local:
                local[node] = self.attribute(new, node)
            if node in local:
                return local[node]
            if not symbolic(node):
                raise Unalike(f"a layer reads {node.name}, which it was not called with")
            return values[node]

        result: fx.Node | None = None
        for node in body:
            if _entry(node):
                local[node] = values[_operand(mark, node)]
                continue
            copy = local[node] = new.node_copy(node, carry)
            stack = tuple(self.rename(s) for s in node.meta["stack"])
            copy.meta = {**node.meta, "stack": stack, "module": self.rename(node.meta["module"])}
            if not symbolic(node) and any(user not in inside for user in node.users):
                result = copy
        if result is None:
            raise Unalike("a traced layer has no result")
        return result
