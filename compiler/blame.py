"""Where in a model's own code a failure came from: file, line and op, from a traceback."""

from __future__ import annotations

import linecache
from pathlib import Path
from types import TracebackType

import torch
from torch import fx

_OURS = (str(Path(torch.__file__).resolve().parent), str(Path(__file__).resolve().parent))
"""Folders of code that is not the model's."""


def blame(error: BaseException) -> str:
    """``file:line in function: source (op)`` of the model's code that an error came out of; empty where none is seen.

    The line is the innermost one that is neither PyTorch's nor qc's; the op is the last that was being traced.
    """
    place = op = ""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frame, number = trace.tb_frame, trace.tb_lineno
        name = frame.f_code.co_filename
        called = frame.f_locals.get("func")
        if isinstance(called, torch._ops.OpOverload):
            op = str(called)
        if not name.startswith("<") and not str(Path(name).resolve()).startswith(_OURS):
            line = linecache.getline(name, number).strip()
            place, op = f"{name}:{number} in {frame.f_code.co_name}: {line}", ""
        trace = trace.tb_next
    return f"{place} ({op})" if place and op else place


def blame_node(node: fx.Node) -> str:
    """The same for an op that was traced: the line of the model's code that ran it."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    files = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not files:
        return str(node.target)
    where, source = lines[files[-1]], " ".join(lines[files[-1] + 1 : files[-1] + 2])
    _, file, rest = where.split('"', 2)
    number, _, name = rest.removeprefix(", line ").partition(", in ")
    return f"{file}:{number} in {name}: {source} ({node.target})"
