"""What the compiler holds when it writes, run in its own graph: what a loaded result has to compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qc.compiler.compile import Result
from qc.compiler.execute import execute, inputs_of
from qc.compiler.fake_quant import fake_act
from qc.compiler.scheme import LinearScheme
from qc.compiler.solve import _PartSolver
from qc.runtime.quantize import dequantize
from qc.runtime.quantized import QuantizedLinear
from tests.homes import rows

Linear = Callable[[str, Tensor, LinearScheme, QuantizedLinear], Tensor]
"""The output of a quantized linear, by its name, on an activation."""


def recorded(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the solver had in hand when it wrote each part."""
    found: dict[str, Any] = {"tensors": {}, "quantized": {}, "schemes": {}, "stubs": {}}
    write = _PartSolver._write

    def keeping(self: _PartSolver) -> None:
        wide = {n: rows.finished(self.plan.program, torch.float32) for n, rows in self.rowwise.items()}
        found["tensors"] |= {**self.tensors, **wide}
        found["quantized"] |= self.quantized
        found["schemes"] |= self.schemes
        found["stubs"] |= self.state.stubs
        write(self)

    patch.setattr(_PartSolver, "_write", keeping)
    return found


def served(name: str, x: Tensor, scheme: LinearScheme, q: QuantizedLinear) -> Tensor:
    """A linear that rounds where the served ops round."""
    y = dequantize(q.weight, q.scale, q.offset)
    if scheme.static:
        assert q.input_scale is not None
        assert q.input_offset is not None
        steps = (x * q.input_scale.reciprocal().bfloat16().float() + q.input_offset).round().clamp(-128, 127)
        grid = (q.input_scale * q.scale).flatten()
        bias = None if q.bias is None else (q.bias / grid).round() * grid  # quant_bias
        return F.linear((steps - q.input_offset) * q.input_scale, y, bias)
    y = F.linear(fake_act(x, scheme, q), y)
    y = y.half().float() if scheme.act and scheme.act.bits == 4 and q.left is None else y
    return y if q.bias is None else y + q.bias.bfloat16().float()


def of_compressed_tensors(name: str, x: Tensor, scheme: LinearScheme, q: QuantizedLinear) -> Tensor:
    """The same as the library compressed-tensors rounds: int8 per token in steps of absmax / 127.5.

    Experts become bfloat16 when transformers unpacks them.
    """
    if scheme.act is not None:
        step, zero = x.abs().amax(-1, keepdim=True) / 127.5, torch.zeros(1)
        if scheme.static:
            assert q.input_scale is not None
            step, zero = q.input_scale, zero if q.input_offset is None else q.input_offset
        x = ((x / step + zero).round().clamp(-128, 127) - zero) * step
    bias = None if q.bias is None else q.bias.bfloat16().float()
    weight = dequantize(q.weight, q.scale, q.offset)
    return F.linear(x, weight.bfloat16().float() if ".experts." in name else weight, bias)


def simulated(result: Result, held: Mapping[str, Any], linear: Linear = served) -> Tensor:
    """The rewritten graph in float32 with linears on their grids: logits of ``tests.homes.rows``."""
    program, (ids, mask) = result.plan.final, rows()
    tensors = {n: t.bfloat16().float() if t.is_floating_point() else t for n, t in held["tensors"].items()}
    tensors |= {n: t.float() for n, t in held["stubs"].items()}

    def run(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        q = held["quantized"].get(name)
        return F.linear(x, weight, bias) if q is None else linear(name, x, held["schemes"][name], q)

    env: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        for part in program.parts:
            given = {node: env[node.name] for node in inputs_of(program, part)}
            found = execute(program, part, tensors, given, dtype=torch.float32, linear=run)
            env |= {node.name: value for node, value in found.items()}
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    return env[output.args[0].name][mask.bool()]
