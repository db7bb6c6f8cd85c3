"""One way to export: without gradients, without guards, quiet about what it tried."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from .capture_numbers import KeptNumbers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the exporter prints about a failure off the terminal; the exception says it."""
    names = ("torch.export", "torch.fx", "torch._dynamo", "torch._export", "torch._subclasses.fake_tensor")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def export_graph(module: nn.Module, example: tuple[Any, ...], dynamic: tuple[Any, ...]) -> fx.GraphModule:
    """Export ``module`` on ``example`` with the axes ``dynamic`` of each input left open.

    Under ``no_grad`` no gradient mode is baked in, so the graph can still be differentiated.
    """
    with quiet(), torch.no_grad(), KeptNumbers():
        program = torch.export.export(
            module, example, dynamic_shapes=(dynamic,) if _variadic(module) else dynamic, strict=False
        )
        return program.module(check_guards=False)  # pyright: ignore[reportReturnType]


def _variadic(module: nn.Module) -> bool:
    """Whether ``forward`` takes its inputs as ``*args``, which exports expect as one group."""
    return bool(module.forward.__code__.co_flags & 0x04) if hasattr(module.forward, "__code__") else False
