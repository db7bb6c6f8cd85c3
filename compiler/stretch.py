"""``qc::stretch``: a stretch of a module's own Python code between two of its linears, as one opaque op.

Scans (Mamba, RWKV, gated delta rules) loop over the length of the input, so no graph with an open length holds
them. The op runs the module's own code: from the start, with the outputs of the linears that came before handed
in, up to the input of the next linear. No law lets anything through it; the linears stay visible beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Size = tuple[int, int, int]
"""A size as c · b^i · s^j: (c, i, j)."""


@dataclass(frozen=True)
class Stretches:
    """What is known of one module whose code is run in stretches."""

    linears: tuple[str, ...]
    """The linears that its code calls, each once, in this order."""
    held: tuple[str, ...]
    """Parameters and buffers that its code uses otherwise; they are operands of every stretch."""
    tree: Any
    """Structure of its arguments."""
    constants: tuple[Any, ...]
    """Arguments that are no tensors, in the places of the leaves; None where a tensor is."""
    sizes: tuple[tuple[Size, ...], ...]
    """Shape of what each stretch gives: the inputs of the linears, then the result."""
    dtypes: tuple[torch.dtype, ...]
    batch: tuple[int, int]
    """Tensor argument and axis that tell the batch size."""
    length: tuple[int, int]
    """Tensor argument and axis that tell the length."""
    closed: bool
    """Whether the result is what the last linear gives."""
    results: tuple[Any, ...] = (None,)
    """Parts of the result that are no tensors, in the places of its leaves; None where the tensor is."""
    result_tree: Any = None

    @property
    def arguments(self) -> int:
        """How many tensors the module is called with."""
        return sum(constant is None for constant in self.constants)


class _Reached(Exception):
    """The code has come to the linear that was waited for."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


ACTIVE: dict[str, Stretches] = {}
"""Modules that are being traced, for the shapes of the op's results."""


@torch.library.custom_op("qc::stretch", mutates_args=())
def stretch(module: str, index: int, tensors: Sequence[Tensor], outs: Sequence[Tensor]) -> Tensor:
    """Stretch ``index`` of a module's code; ``tensors`` are its arguments and what it holds, ``outs`` the outputs of
    the linears before. It is run by a program, which has the module (``compiler.execute``)."""
    raise RuntimeError(f"a stretch of {module} is run by a program, not by itself")


@stretch.register_fake
def _(module, index, tensors, outs):
    known = ACTIVE[module]
    (i, axis), (j, other) = known.batch, known.length
    b, s = tensors[i].shape[axis], tensors[j].shape[other]
    size = [c * (b if power else 1) * (s if again else 1) for c, power, again in known.sizes[index]]
    return tensors[0].new_empty(size, dtype=known.dtypes[index])


STRETCH = torch.ops.qc.stretch.default


class InFloat64(TorchFunctionMode):
    """Floats that the code would make or cast to are float64, so that proofs lose nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        wide = lambda x: torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x  # noqa: E731
        return func(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})


def run_stretch(
    module: nn.Module, known: Stretches, index: int, tensors: Sequence[Tensor], outs: Sequence[Tensor]
) -> Tensor:
    """Run one stretch of a module's code on tensors, differentiable."""
    given, held = tensors[: known.arguments], tensors[known.arguments :]
    entered = iter(given)
    leaves = [next(entered) if constant is None else constant[0] for constant in known.constants]
    args, kwargs = pytree.tree_unflatten(leaves, known.tree)
    state = dict(zip(known.held, held, strict=True))
    with unchanged(module), _stubs(module, known, outs):
        try:
            result = torch.func.functional_call(module, state, args, kwargs)
        except _Reached as reached:
            return reached.value
    return main_tensor(result)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Take back what code keeps in its modules while it runs: the state of a recurrence, a table that has grown."""
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.update(buffers)


def main_tensor(result: Any) -> Tensor:
    """The only tensor of a result."""
    (tensor,) = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    return tensor


@contextmanager
def _stubs(module: nn.Module, known: Stretches, outs: Sequence[Tensor]) -> Iterator[None]:
    """Linears that give what is handed in; the first that has nothing stops the code."""
    handed: Mapping[str, Tensor] = dict(zip(known.linears, outs, strict=False))
    linears = {name: module.get_submodule(name) for name in known.linears}

    def stub(name: str) -> Any:
        def forward(x: Tensor) -> Tensor:
            if name not in handed:
                raise _Reached(x)
            return handed[name]

        return forward

    for name, linear in linears.items():
        linear.forward = stub(name)
    try:
        yield
    finally:
        for linear in linears.values():
            vars(linear).pop("forward", None)
