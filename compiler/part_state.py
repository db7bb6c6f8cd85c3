"""The state of one part of a program while rewrites are applied to it: float tensors, large tables, integers, grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..runtime.quantized import QuantizedLinear
from .contract import Rewrite
from .edit import Verb, apply, by_module
from .operand import Quantize, Slot, Stub
from .program import Program
from .rows import RowwiseTensor
from .scheme import LinearScheme


@dataclass
class PartState:
    """What the rewrites so far have made of the tensors of a part. Tensors are never changed in place."""

    program: Program
    """The float program: its leaves say what an edit does to a weight."""
    tensors: dict[str, Tensor]
    """Float32, by qualified name; grids of attentions are zero."""
    rowwise: dict[str, RowwiseTensor] = field(default_factory=dict)
    """Tables too large to edit at once."""
    quantized: dict[str, QuantizedLinear] = field(default_factory=dict)
    schemes: dict[str, LinearScheme] = field(default_factory=dict)
    stubs: dict[str, Tensor] = field(default_factory=dict)
    """Grids of attentions, as they are written; everything but the quantized model runs without them."""

    def copy(self) -> PartState:
        """One that can go another way."""
        return PartState(
            self.program, dict(self.tensors), {name: rows.copy() for name, rows in self.rowwise.items()},
            dict(self.quantized), dict(self.schemes), dict(self.stubs),
        )  # fmt: skip

    def apply(self, rewrite: Rewrite, values: Mapping[Slot, Any]) -> None:
        """Apply a rewrite whose edits lie in this part, with its slots filled."""
        before = dict(self.tensors)
        for edit in rewrite.edits:
            if isinstance(edit.operand, Stub):
                self._calibrate(edit.site.module, edit.operand, values[edit.operand.slot])
        rewrite = replace(rewrite, edits=tuple(e for e in rewrite.edits if e.verb is not Verb.STUB))
        for module, edits in by_module(rewrite.edits).items():
            if all(edit.verb is Verb.SWAP for edit in edits):
                for edit in edits:
                    assert isinstance(edit.operand, Quantize)
                    self.quantized[module] = values[edit.operand.slot]
                    self.schemes[module] = edit.operand.scheme
                continue
            rows = self.rowwise.get(f"{module}.weight")
            if rows is not None:
                rows.edit(edits, values, before)
                continue
            new = apply(self.program, module, edits, values, before.get, torch.float64)
            new = {local: t.float() if t.is_floating_point() else t for local, t in new.items()}
            self.tensors.update({f"{module}.{local}": tensor for local, tensor in new.items()})

    def _calibrate(self, module: str, stub: Stub, found: Tensor) -> None:
        """Keep scale and offset of a stub, in the dtypes in which they are stored."""
        size = self.tensors[f"{module}.{stub.leaves[0]}"].shape
        kinds = (torch.float32, torch.int8 if stub.kind == "fa" else torch.float32)
        for leaf, tensor, kind in zip(stub.leaves, found, kinds, strict=True):
            self.stubs[f"{module}.{leaf}"] = tensor.reshape(size).to(kind)
