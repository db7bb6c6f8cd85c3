"""Modules that a model keeps in plain Python lists, of which PyTorch knows nothing: registered in a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn


def registered(model: nn.Module) -> nn.Module:
    """The model with every plain list of modules as an ``nn.ModuleList``; itself where it has none.

    It is a copy that shares all parameters and buffers. A list whose modules are registered elsewhere stays a list.
    """
    if not any(_plain_lists(module) for module in _reached(model)):
        return model
    shared: dict[int, Any] = {
        id(tensor): tensor
        for module in _reached(model)
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    }
    made = copy.deepcopy(model, shared)
    for module in _reached(made):
        for name in _plain_lists(module):
            modules = vars(module).pop(name)
            module.add_module(name, nn.ModuleList(modules))
    return made


def _plain_lists(module: nn.Module) -> list[str]:
    """Attributes of a module that are lists of modules it does not know of."""
    known = set(module.modules())
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, list | tuple)
        and value
        and all(isinstance(item, nn.Module) for item in value)
        and not known.issuperset(value)
    ]


def _reached(model: nn.Module) -> Iterator[nn.Module]:
    """All modules that can be reached, through plain lists too, each once."""
    seen: set[nn.Module] = set()
    ahead = [model]
    while ahead:
        module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        yield module
        ahead += [item for name in _plain_lists(module) for item in vars(module)[name]]
        ahead += module.children()
