"""Find the modules whose code has no graph, and trace them in stretches around their linears.

Found by behaviour: the model runs on meta on a short and on a long input, and the ops that each module itself
runs are compared. Where they differ there is a loop over the length, or over chunks of it. Other code asks for the
values of tensors: which experts were hit, how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .blocks import largest_list
from .canon import aten
from .stretch import ACTIVE, STRETCH, Size, Stretches, unchanged

SHORT, LONG = (2, 7), (2, 600)
"""Batch and length of the inputs that are compared: the long one is longer than the chunks in use."""
PROBES = ((2, 7), (3, 7), (2, 11))
"""Batches and lengths that tell which sizes follow from which."""

Run = Callable[[int, int], None]
"""Runs the model on meta, on a batch of so many inputs of some length."""


@dataclass
class Called:
    """One call of a module that is looked at."""

    leaves: list[Any]
    tree: Any
    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    """Linears that it called, with what they read."""
    outputs: list[Tensor] = field(default_factory=list)
    result: Any = None


ASK = frozenset({aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
                 aten._unique2.default, aten.unique_consecutive.default})  # fmt: skip
"""Ops whose result is a number, or has a size, that depends on the values of tensors."""


class _Numbers(TorchDispatchMode):
    """What code reads off the values of tensors is zero or empty on meta: a question that it asks is answered no."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is aten.nonzero.default:
            return args[0].new_empty((0, args[0].ndim), dtype=torch.int64)
        if func is aten.masked_select.default:
            return args[0].new_empty(0)
        if func is aten.index.Tensor and (mask := _mask_of(func, args)) is not None:
            place = [part is mask for part in args[1]].index(True)
            return args[0].new_empty((*args[0].shape[:place], 0, *args[0].shape[place + mask.ndim :]))
        return func(*args, **(kwargs or {}))


def _mask_of(func: Any, args: Any) -> Tensor | None:
    """The boolean mask by which an op picks from its first operand."""
    if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return None
    return next((part for part in args[1] if part is not None and part.dtype == torch.bool), None)


class _Ops(TorchDispatchMode):
    """The ops that each module runs by itself, in order."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running, self.found = running, dict[str, list[str]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = aten.nonzero.default if _mask_of(func, args) is not None else func
        self.found.setdefault(self.running[-1], []).append(str(asked))
        return func(*args, **(kwargs or {}))


def _ops_of(model: nn.Module, run: Run, size: tuple[int, int]) -> dict[str, list[str]]:
    running = [""]
    hooks = []
    for name, module in model.named_modules():
        hooks += [
            module.register_forward_pre_hook(lambda m, args, name=name: running.append(name)),
            module.register_forward_hook(lambda m, args, result: (running.pop(), None)[1], always_call=True),
        ]
    try:
        with torch.no_grad(), _Numbers(), _Ops(running) as ops:
            run(*size)
    finally:
        for hook in hooks:
            hook.remove()
    return ops.found


def _opaque(model: nn.Module, run: Run, values: bool) -> list[str]:
    """Modules whose own ops depend on the length of the input, and with ``values`` those that ask for the values of
    tensors: innermost, in graph order; no whole models."""
    short, long = (_ops_of(model, run, size) for size in (SHORT, LONG))
    asking = {str(op) for op in ASK}
    found = [n for n in short if short[n] != long.get(n) or (values and not asking.isdisjoint(short[n]))]
    return _innermost([name for name in found if _inside(model, name)])


def _inside(model: nn.Module, name: str) -> bool:
    """Whether a module is a part of the model, and not what runs the stack of its blocks."""
    stack = largest_list(model)
    return bool(name) and not f"{stack}.".startswith(f"{name}.")


def _innermost(names: Sequence[str]) -> list[str]:
    return [n for n in dict.fromkeys(names) if not any(other.startswith(f"{n}.") for other in names)]


@contextmanager
def _watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Called]]]:
    """Record the calls of some modules and of the linears inside them."""
    calls: dict[str, list[Called]] = {name: [] for name in names}
    hooks = []
    for name in names:
        module = model.get_submodule(name)

        def enter(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            leaves, tree = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
            calls[name].append(Called(leaves, tree))

        def leave(m: nn.Module, args: Any, result: Any, name: str = name) -> None:
            calls[name][-1].result = result

        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave))
        for local, inner in module.named_modules():
            if isinstance(inner, nn.Linear) and local:

                def reads(m: nn.Module, args: Any, y: Any, name: str = name, local: str = local) -> None:
                    calls[name][-1].inputs.append((local, args[0]))
                    calls[name][-1].outputs.append(y)

                hooks.append(inner.register_forward_hook(reads))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def stretches_of(model: nn.Module, run: Run, values: bool = False) -> dict[str, Stretches]:
    """What is known of every module that has to be traced in stretches; none for most models.

    A module that cannot be, since it is called twice or gives more than one tensor, leaves it to the one around it.
    With ``values`` the modules that ask for the values of tensors are among them.
    """
    found: dict[str, Stretches] = {}
    with unchanged(model):
        names = _opaque(model, run, values)
        while names:
            with torch.no_grad(), _Numbers(), _watched(model, names) as calls:
                for size in PROBES:
                    run(*size)
            known = {name: _stretches(model.get_submodule(name), calls[name]) for name in names}
            found |= {name: one for name, one in known.items() if one is not None}
            around = [name.rpartition(".")[0] for name, one in known.items() if one is None]
            names = _innermost([name for name in around if _inside(model, name)])
            found = {n: one for n, one in found.items() if not any(n.startswith(f"{m}.") for m in names)}
    return found


def _stretches(module: nn.Module, calls: list[Called]) -> Stretches | None:
    """None for a module that is called more than once, or has other results than one tensor."""
    if len(calls) != len(PROBES):
        return None
    first = calls[0]
    names = [name for name, _ in first.inputs]
    empty = {
        name for call in calls for name, x in call.inputs if not x.numel()
    }  # as many rows as the values say
    once = [name for name in names if names.count(name) == 1 and name not in empty]
    results = [[x for x in pytree.tree_leaves(call.result) if isinstance(x, Tensor)] for call in calls]
    if any(len(tensors) != 1 for tensors in results):
        return None
    values = [
        [x for name, x in call.inputs if name in once] + tensors
        for call, tensors in zip(calls, results, strict=True)
    ]
    sizes = [_sizes(shapes) for shapes in zip(*([x.shape for x in own] for own in values), strict=True)]
    arguments = [[x for x in call.leaves if isinstance(x, Tensor)] for call in calls]
    given = [_sizes(shapes) for shapes in zip(*([x.shape for x in own] for own in arguments), strict=True)]
    batch, length = _where(given, (1, 1, 0)), _where(given, (1, 0, 1))
    if any(size is None for size in (*sizes, batch, length)):
        return None
    stubbed = {
        f"{name}.{local}" for name in once for local, _ in module.get_submodule(name).named_parameters()
    }
    state = [*(n for n, _ in module.named_parameters()), *(n for n, _ in module.named_buffers())]
    last = first.outputs[names.index(once[-1])] if once else None
    return Stretches(
        tuple(once), tuple(n for n in state if n not in stubbed), first.tree,
        tuple(None if isinstance(x, Tensor) else (x,) for x in first.leaves),
        tuple(size for size in sizes if size is not None), tuple(x.dtype for x in values[0]),
        batch or (0, 0), length or (0, 1), results[0][0] is last,
        tuple(None if isinstance(x, Tensor) else (x,) for x in pytree.tree_leaves(first.result)),
        pytree.tree_structure(first.result),
    )  # fmt: skip


def _sizes(shapes: Sequence[Sequence[int]]) -> tuple[Size, ...] | None:
    """Sizes of a value as they follow from batch and length; None where they do not."""
    found = []
    for dims in zip(*shapes, strict=True):
        size = next((known for known in (_size(dims, i, j) for i in (0, 1) for j in (0, 1)) if known), None)
        if size is None:
            return None
        found.append(size)
    return tuple(found)


def _size(dims: Sequence[int], i: int, j: int) -> Size | None:
    factors = [b**i * s**j for b, s in PROBES]
    c = dims[0] // factors[0]
    return (c, i, j) if all(c * f == d for f, d in zip(factors, dims, strict=True)) else None


def _where(given: Sequence[tuple[Size, ...] | None], wanted: Size) -> tuple[int, int] | None:
    return next(
        (
            (i, axis)
            for i, sizes in enumerate(given)
            for axis, size in enumerate(sizes or ())
            if size == wanted
        ),
        None,
    )


@contextmanager
def traced_in_stretches(model: nn.Module, known: dict[str, Stretches]) -> Iterator[None]:
    """In this context the modules mark their stretches when they are called, instead of running their code."""
    modules = {name: model.get_submodule(name) for name in known}
    ACTIVE.update(known)
    for name, module in modules.items():
        module.forward = _forward(name, module, known[name])
    try:
        yield
    finally:
        for name, module in modules.items():
            vars(module).pop("forward", None)
            ACTIVE.pop(name, None)


def _forward(name: str, module: nn.Module, known: Stretches) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, _ = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        state = dict(module.named_parameters()) | dict(module.named_buffers())
        tensors = [x for x in leaves if isinstance(x, Tensor)] + [state[own] for own in known.held]
        outs: list[Tensor] = []
        for index, linear in enumerate(known.linears):
            outs.append(module.get_submodule(linear)(STRETCH(name, index, tensors, outs)))
        value = outs[-1] if known.closed else STRETCH(name, len(known.linears), tensors, outs)
        leaves = [value if part is None else part[0] for part in known.results]
        return pytree.tree_unflatten(leaves, known.result_tree)

    return forward
