"""Devices: where blocks run, what a device can compute, and what is moved to it and back."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import Failed, Refused

T = TypeVar("T")

CPU = torch.device("cpu")
"""The host, on which weights are read, proved and written, and on which blocks run where nobody says."""
PACKAGES = {"npu": "torch_npu"}
"""Devices that PyTorch knows once a package of their own is imported."""


def device_named(text: str) -> torch.device:
    """The device that a name such as ``cuda:0``, ``npu:0`` or ``mps`` stands for, with its index; ``cpu`` has none.

    Raises:
        Refused: No name of a device, one whose backend this PyTorch or this machine has not, or an index that is not
            there.
    """
    kind = text.partition(":")[0]
    if kind in PACKAGES:
        _import(text, PACKAGES[kind])
    try:
        device = torch.device(text)
    except RuntimeError:
        raise Refused(
            f"--device {text}: PyTorch knows no such device; give cpu, or an accelerator such as cuda:0, npu:0 or mps"
        ) from None
    if device.type == "cpu":
        if device.index:
            raise Refused(f"--device {text}: there is one cpu; give cpu")
        return CPU
    try:
        backend = torch.get_device_module(device)
    except RuntimeError:
        backend = None
    if backend is None or not backend.is_available():
        name = {"cuda": "CUDA", "npu": "NPU", "mps": "MPS", "xpu": "XPU"}.get(device.type, device.type)
        raise Refused(
            f"--device {text}: this PyTorch has no {name}; it is {torch.__version__}, and sees no such device. Leave"
            " --device out to run blocks on the cpu"
        )
    count = backend.device_count()
    if (device.index or 0) >= count:
        there = f"{device.type}:0" + (f" to {device.type}:{count - 1}" if count > 1 else "")
        raise Refused(f"--device {text}: there is no device of that number; there is {there}")
    device = torch.device(device.type, device.index or 0)
    try:
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        raise Refused(f"--device {text}: it can not be used: {error}") from error
    return device


def _import(text: str, package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise Refused(
            f"--device {text}: PyTorch knows it once {package} is there, and that does not import ({error}). Install"
            f" the {package} that fits torch {torch.__version__}, or leave --device out"
        ) from None


@cache
def has_float64(device: torch.device) -> bool:
    """Whether a device solves in float64, tried once: Metal has no such numbers, some NPUs no factors of them."""
    if device.type == "cpu":
        return True
    try:
        factor = torch.linalg.cholesky(4 * torch.eye(2, dtype=torch.float64, device=device))
        return float(torch.cholesky_inverse(factor)[0, 0]) == 0.25
    except (RuntimeError, TypeError, NotImplementedError):
        return False


@cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether an accelerator multiplies bfloat16 in hardware, as it says itself, or at all where it says nothing."""
    known = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    try:
        if device.type == "cuda" and known is not None:
            return bool(known(including_emulation=False))
        if known is not None:
            return bool(known())
        x = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        return float((x @ x)[0, 0]) == 2.0
    except (RuntimeError, TypeError, NotImplementedError):
        return False


@contextmanager
def explained(device: torch.device, what: str) -> Iterator[None]:
    """Say what to do where a device has no memory left, or where a tensor of the host is mixed with its tensors.

    Raises:
        Failed: In the place of PyTorch's error; ``what`` was being worked on.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if device != CPU and (isinstance(error, torch.OutOfMemoryError) or "out of memory" in said):
            raise Failed(
                f"{what}: {device} has no memory left ({said}). Give --max-memory {device}=SIZE with what is free"
                " there, fewer --samples or a smaller --length, or leave --device out"
            ) from error
        if device != CPU and ("same device" in said or "device type" in said):
            raise Failed(
                f"{what}: it mixes tensors of the host with those of {device} ({said}). A pass makes its tensors with"
                " device=view.device; until it does, leave --device out"
            ) from error
        raise


def peak_on(device: torch.device) -> int:
    """The most bytes that PyTorch held of a device so far; 0 of the host, and where its backend does not say."""
    told = None if device == CPU else getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return 0 if told is None else int(told(device))


def doubled(x: Tensor) -> Tensor:
    """x in float64, on its own device where that solves in float64, else on the host.

    Whatever is made beside it is made on the device of the result, and goes back with ``.to(x)`` when it is done.
    """
    return x.double() if has_float64(x.device) else x.cpu().double()


def moved(value: Any, device: torch.device) -> Any:
    """A value with all its tensors on a device: a tensor, a list, mapping or dataclass of them; others as they are."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(one, device) for one in value)
    if isinstance(value, Mapping):
        return {key: moved(one, device) for key, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: moved(getattr(value, one.name), device) for one in fields(value)})
    return value


class Mirror(Mapping[str, T]):
    """Values of the host by name, as they are on a device: each is moved when it is asked for, and stays there.

    A value of the host that is replaced by another is moved again; none is ever changed in place.
    """

    def __init__(self, host: Mapping[str, T], device: torch.device) -> None:
        self.host, self.device = host, device
        self._there: dict[str, tuple[T, T]] = {}

    def __getitem__(self, name: str) -> T:
        own = self.host[name]
        if self.device == CPU:
            return own
        known = self._there.get(name)
        if known is None or known[0] is not own:
            known = self._there[name] = own, moved(own, self.device)
        return known[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.host)

    def __len__(self) -> int:
        return len(self.host)

    def __contains__(self, name: object) -> bool:
        return name in self.host
