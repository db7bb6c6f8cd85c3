"""Rotation of the residual stream, adapted to what the linears read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ..compiler.adapted import Adapted, Turn
from ..compiler.contract import Answer, Rewrite, Setting
from ..compiler.device import CPU
from ..compiler.operand import Hadamard, Statistic
from ..compiler.program import Program
from ..compiler.roles import roles_of
from ..compiler.view import BlockView
from ..patterns.norm_linear import norm_linear
from .procrustes import adapt
from .rotate_residual import RotateResidual
from .sites import block_linears

BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True, kw_only=True)
class AdaptResidual(RotateResidual):
    """Rotate the hidden state by a Hadamard matrix that was turned towards the grid of its own values.

    **Why.** A fixed rotation spreads outliers whatever the model; turned a little, the values that linears read lie
    nearer to integers.

    **Before / after.** As ``rotate_residual``, with ``Q R`` for Q. R comes from a run of the float model over the
    calibration text before anything is solved: rows that linears read behind a norm, without its gain, are rounded
    per token, and R is the rotation that brings them nearest to what they are rounded to, again and again.

    **Source.** ``adapt_rotation`` of LAOS (``spec/modelslim.md`` 2.11); Schönemann (1966).
    """

    name = "adapt_residual"
    summary = "rotate the residual stream by a Hadamard matrix that is turned towards the grid of its values"

    steps: int = 20
    """Most turns of the search, 1 to 1000."""
    quant_dtype: Literal["int4", "int8"] = "int4"
    """The grid on which values are rounded."""
    layer_type: tuple[str, ...] = ()
    """Linears whose inputs are looked at: those whose name contains one of these; none takes the writers of gated
    products, and in a model that has none every linear behind a norm."""
    max_samples: int = 2048
    """Tokens that are kept of each such linear, 1 to 100000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps={self.steps}: it must be 1 to 1000")
        if not 1 <= self.max_samples <= 100_000:
            raise ValueError(f"max_samples={self.max_samples}: it must be 1 to 100000")
        if not all(self.layer_type):
            raise ValueError("layer_type: an empty part of a name is in every name: leave it out")
        if self.quant_dtype not in BITS:
            raise ValueError(f"quant_dtype={self.quant_dtype}: it is int4 or int8")

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """As the fixed rotation, once there are linears to look at."""
        answer = super().rewrite(program, setting)
        if not answer.rewrites or self.norms(program):
            return answer
        named = ", ".join(self.layer_type)
        behind = [reader.module for match in norm_linear.find(program) for reader in match.readers]
        return Answer(
            (), problems=(f"layer_type={named}: no linear behind a norm has that in its name; there are "
                          f"{', '.join(dict.fromkeys(name.rpartition('.')[2] for name in behind))}",)
        )  # fmt: skip

    def rotation(self, rotation: Hadamard, program: Program) -> Hadamard:
        """With room for what the survey finds."""
        return Adapted(
            rotation.order, rotation.seed, rotation.copies, rotation.keeps_ones, _Rows(self.norms(program))
        )

    def norms(self, program: Program) -> dict[str, tuple[str, float]]:
        """The linears that are looked at, one of those that read one value, with their norm and its gain's offset."""
        inside, found = block_linears(program), dict[str, tuple[str, float]]()
        gated = roles_of(program)["gated"]
        for match in norm_linear.find(program):
            facts = program.leaves[match.norm.module].norm
            names = [r.module for r in match.readers if r.channels is None and r.module in inside]
            if self.layer_type:
                taken = [name for name in names if any(part in name for part in self.layer_type)]
            else:
                taken = [name for name in names if name in gated or not gated]
            if taken and facts is not None:
                found[taken[0]] = (match.norm.module, facts.offset)
        return found

    def surveys(self, rewrite: Rewrite) -> tuple[Statistic, ...]:
        """Rows that the linears read."""
        rows = _rows(rewrite)
        return () if rows is None else tuple(Statistic(f"rows:{self.max_samples}", n) for n in rows.norms)

    def survey(self, rewrite: Rewrite, view: BlockView) -> None:
        """Keep the rows without gain and bias of their norm: what they are once norms are fused."""
        rows = _rows(rewrite)
        assert rows is not None
        for need, seen in view.statistics.items():
            norm, offset = rows.norms[need.module]
            gain = view.weight(norm) + offset
            bias = view.bias(norm)
            plain = seen if bias is None else seen - bias
            rows.seen.append(torch.where(gain == 0, 0.0, plain / torch.where(gain == 0, 1.0, gain)).cpu())
            rows.device = view.device

    def learn(self, rewrite: Rewrite) -> Mapping[str, float]:
        """Turn the rotation."""
        rows = _rows(rewrite)
        assert rewrite.basis is not None
        assert rows is not None
        rotation, rows.matrix = rewrite.basis.rotation, None
        turned = torch.cat([rotation.times(seen) for seen in rows.seen])
        rows.seen.clear()
        rows.matrix, before, after = adapt(
            turned, BITS[self.quant_dtype], self.steps, rotation.keeps_ones, rows.device
        )
        return {"rows": float(len(turned)), "error before": before, "error after": after}


class _Rows(Turn):
    """The turn, and what it is made from while the survey runs."""

    def __init__(self, norms: Mapping[str, tuple[str, float]]) -> None:
        super().__init__()
        self.norms = norms
        self.seen: list[torch.Tensor] = []
        """On the host, for there is one of every block."""
        self.device = CPU


def _rows(rewrite: Rewrite) -> _Rows | None:
    rotation = rewrite.basis.rotation if rewrite.basis is not None else None
    return rotation.turn if isinstance(rotation, Adapted) and isinstance(rotation.turn, _Rows) else None
