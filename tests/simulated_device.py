"""A simulated accelerator, ``sim:0``: it computes on the CPU and refuses what CUDA refuses of tensors of the host.

A tensor of the device wraps one of the host. An op unwraps its operands, runs, and wraps the results; autograd works
above that as on any device. An op with operands of both sides is refused, but for copies and for numbers of no
dimension; so is a generator of the host where the device draws. It is stricter than CUDA in one thing: an index on the
host is refused too. Tensors of the device have no ``numpy``.
"""

from __future__ import annotations

import weakref
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "sim:0"
COPIES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::set_")
"""Ops that go from one side to the other."""


class Memory:
    """Bytes of the storages that tensors of the device hold; what an op needs inside is not counted."""

    def __init__(self) -> None:
        self.held: dict[int, list[int]] = {}
        """Address to how many tensors hold it, and its bytes."""
        self.now = self.most = 0

    def took(self, address: int, size: int) -> None:
        """A tensor was made."""
        if address not in self.held:
            self.held[address] = [0, size]
            self.now += size
            self.most = max(self.most, self.now)
        self.held[address][0] += 1

    def left(self, address: int) -> None:
        """A tensor is gone."""
        self.held[address][0] -= 1
        if not self.held[address][0]:
            self.now -= self.held.pop(address)[1]


memory = Memory()


class OnDevice(Tensor):
    """A tensor of the device."""

    host: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME), requires_grad=False,
        )  # fmt: skip
        made.host = inner
        storage = inner.untyped_storage()
        memory.took(storage.data_ptr(), storage.nbytes())
        weakref.finalize(made, memory.left, storage.data_ptr())
        return made

    def __init__(self, inner: Tensor) -> None:
        """Everything is done when it is made."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.host})"

    def tolist(self) -> Any:
        """Its numbers, which come to the host as those of every device do."""
        return self.host.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as of every tensor that is not on the host."""
        raise TypeError(f"can't convert {NAME} device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class Lacking:
    """What the device is without, while a test says so."""

    float64 = False


ops = 0
"""How many ops ran on the device so far."""


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """What an op makes of tensors of the device."""
    global ops
    ops += 1
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    name = func._schema.name
    if name not in COPIES and any(isinstance(one, OnDevice) for one in given):
        for one in given:
            if not isinstance(one, OnDevice) and one.dim():
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {NAME} and"
                    f" {one.device}! ({name}, {tuple(one.shape)})"
                )
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    there = kwargs.get("device")
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    found = func(*inner_args, **inner_kwargs)
    if any(isinstance(one, OnDevice) and one.shape != one.host.shape for one in given):
        raise NotImplementedError(f"{name} gave a tensor of {NAME} another shape, which it can not take")
    if there is not None and torch.device(there).type == "cpu":
        return found
    if name == "aten::copy_" and not isinstance(args[0], OnDevice):
        return args[0]
    if name.endswith("_") and args and isinstance(args[0], OnDevice) and found is args[0].host:
        return args[0]
    return tree_map(_outer, found)


def _computed_of(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _computed(func, args, kwargs)


def _inner(one: Any) -> Any:
    if isinstance(one, torch.device):
        return torch.device("cpu")
    return one.host if isinstance(one, OnDevice) else one


def _outer(one: Any) -> Any:
    if not isinstance(one, Tensor):
        return one
    if Lacking.float64 and one.dtype == torch.float64:
        raise TypeError(f"Cannot convert a tensor to float64: {NAME} does not support float64")
    return OnDevice(one)


class _Backend:
    """What PyTorch asks of a backend."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def is_bf16_supported(self) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def max_memory_allocated(self, device: torch.device) -> int:
        return memory.most

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """It draws nothing."""


RESIZING = ("arange", "eye", "randperm")
"""Ops that PyTorch makes of an empty tensor, which gets its size later: here they run whole."""
_every = torch.library.Library("_", "IMPL")
_aten = torch.library.Library("aten", "IMPL")


@cache
def simulated() -> torch.device:
    """The device, which PyTorch knows from here on in this process."""
    _setup_privateuseone_for_python_backend(NAME.partition(":")[0], backend_module=_Backend())
    _every.fallback(_computed_of, "PrivateUse1")
    for name in RESIZING:
        op = getattr(torch.ops.aten, name)
        for overload in op.overloads():
            if "out" not in overload and overload != "names":
                one = getattr(op, overload)
                _aten.impl(one, partial(_computed_of, one), "PrivateUse1")
    return torch.device(NAME)
