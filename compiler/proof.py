"""Prover: carries proof rows through the model in float64 and proves the rewrites of each part on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..runtime.divided import LEAF
from ..runtime.outlier_channels import CHANNELS
from ..runtime.quantized import QuantizedLinear
from .certificate import Cast, Certificate, Edited, check, error, outcome, random_rows
from .contract import Basis, Rewrite
from .errors import NotEquivalent
from .incremental import Values
from .measured import Noise, Spreads
from .operand import Slot
from .plan import Plan, Step
from .program import Part, Program
from .rows import RowwiseTensor
from .scheme import LinearScheme

TOKENS = 64
"""Tokens per proof row: one row of calibration text and one of random hidden states."""
VOCABULARY = 1024
"""Rows of the head that proofs look at."""


@dataclass
class Proved:
    """How far the proofs of one part have come."""

    part: Part
    original: dict[str, Any]
    """What the part computed before all rewrites."""
    current: dict[str, Any]
    """What it computes with the rewrites so far, as they are kept (float32)."""
    values: Values | None = None
    """All its values with the rewrites so far, in the state of the step in work."""
    spreads: Spreads = field(default_factory=Spreads)
    """What its linears read and held before all rewrites."""


@dataclass(frozen=True)
class Evidence:
    """What a failed proof ran on: the tensors of the part before the rewrite, its values, and the rows that entered."""

    part: Part
    step: Step
    rewrite: Rewrite
    tensors: Mapping[str, Tensor]
    values: Mapping[Slot, Any]
    rows: Mapping[str, Any]
    math: float


class Prover:
    """Proof rows at the entrance of the part in work, float64, in the basis of the original program."""

    def __init__(self, plan: Plan, ids: Tensor) -> None:
        self.plan = plan
        generator = torch.Generator().manual_seed(plan.seed)
        row = ids[:1, :TOKENS]
        noise = torch.randint(0, int(ids.max()) + 1, row.shape, generator=generator)
        self.ids = torch.cat([row, noise])
        self.env: dict[str, Any] = {}

    def prologue(self, rowwise: Mapping[str, RowwiseTensor]) -> None:
        """Place the token ids at the entrance. Of a large embedding only the rows in use are looked at."""
        ids = self.ids
        tables = [
            rows for rows in rowwise.values() if self.plan.program.leaves[rows.module].kind == "embedding"
        ]
        if len(tables) == 1 and self._only_embedded(tables[0].module):
            used, ids = torch.unique(self.ids, return_inverse=True)
            tables[0].sample = used
        else:
            for table in tables:
                table.sample = torch.arange(len(table.full))
        self.env = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _only_embedded(self, module: str) -> bool:
        """Whether token ids are looked up in one table, and otherwise only asked for their number."""
        node = next(node for node in self.plan.program.graph.nodes if node.name == "input_ids")
        return all(
            user.target == module or not isinstance(user.meta.get("val"), Tensor) for user in node.users
        )

    def sample(self, rowwise: Mapping[str, RowwiseTensor]) -> None:
        """Choose the rows of the head that proofs look at."""
        for rows in rowwise.values():
            step = max(1, len(rows.full) // VOCABULARY)
            rows.sample = torch.arange(0, len(rows.full), step)

    def start(self, part: Part, tensors: Mapping[str, Tensor]) -> Proved:
        """Run a part as it is."""
        spreads = Spreads()
        result = outcome(self.plan.program, part, tensors, self.env, (), spreads)
        return Proved(part, result, result, spreads=spreads)

    def prove(
        self,
        proved: Proved,
        step: Step,
        rewrite: Rewrite,
        tensors: Mapping[str, Tensor],
        values: Mapping[Slot, Any],
    ) -> Certificate:
        """Prove one rewrite of a part on the state before it, or stop with NotEquivalent."""
        program, bases = self._after(step)
        part = proved.part
        base = {**neutral(program, part), **tensors}
        exact = Edited(program, base, rewrite.edits, values)
        kept = Edited(program, base, rewrite.edits, values, rounded=torch.float32)
        cast = Edited(program, base, rewrite.edits, values, rounded=self.plan.dtype)
        where, again = f"{rewrite.pass_name} at {rewrite.where} ({part.name})", f"--passes up to {step.what}"
        if rewrite.basis is not None:  # every value of the part is another one
            math = error(proved.current, outcome(program, part, exact, self.env, bases), self.env)
            exact.forget()
            self._check(where, math, again, Evidence(part, step, rewrite, tensors, values, self.env, math))
            stored = error(proved.current, outcome(program, part, cast, self.env, bases), self.env)
            cast.forget()
            proved.current, proved.values = outcome(program, part, kept, self.env, bases), None
            return Certificate(math, stored, self.ids.numel())
        if proved.values is None or proved.values.program is not program:
            proved.values = Values(program, part, Edited(program, base, (), {}), self.env, bases)
        now = proved.values
        math = error(proved.current, now.results(now.changed(rewrite.modules, exact)), self.env)
        exact.forget()
        self._check(where, math, again, Evidence(part, step, rewrite, tensors, values, self.env, math))
        stored = error(proved.current, now.results(now.changed(rewrite.modules, cast)), self.env)
        cast.forget()
        now.values |= now.changed(rewrite.modules, kept)
        proved.current = now.results()
        return Certificate(math, stored, self.ids.numel())

    def _check(self, where: str, math: float, again: str, evidence: Evidence) -> None:
        """Stop when an EXACT rewrite changed the function, with what the proof ran on."""
        try:
            check(where, math, again)
        except NotEquivalent as failed:
            failed.evidence = evidence
            raise

    def stored(self, proved: Proved, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> float:
        """Error of a part with all its rewrites and its tensors cast to the dtype of export, against the original."""
        program, part = self.plan.final, proved.part
        cast = Cast(tensors, dtype)
        return error(proved.original, outcome(program, part, cast, self.env, self.plan.bases), self.env)

    def measure(
        self, part: Part, tensors: Mapping[str, Tensor], quantized: Mapping[str, QuantizedLinear],
        schemes: Mapping[str, LinearScheme],
    ) -> Noise:  # fmt: skip
        """Run a part with all its rewrites in float, and look at its linears and at the noise of their integers."""
        noise = Noise(quantized, schemes)
        outcome(self.plan.final, part, tensors, self.env, self.plan.bases, noise)
        return noise

    def finish(self, proved: Proved) -> None:
        """Move the proof rows to the entrance of the next part; the second row of hidden states is drawn anew."""
        for name, value in proved.original.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:2] == self.ids.shape:
                noise = random_rows(value[:1], self.plan.seed, proved.part.name)
                value = torch.cat([value[:1], noise])
            self.env[name] = value

    def _after(self, step: Step) -> tuple[Program, tuple[Basis, ...]]:
        """The program and the bases after a step."""
        if step.index + 1 < len(self.plan.steps):
            following = self.plan.steps[step.index + 1]
            return following.program, following.bases
        return self.plan.final, self.plan.bases


def neutral(program: Program, part: Part) -> dict[str, Tensor]:
    """Tensors of inserted ops that change nothing until their edit comes: identities, unit scales, no index, zeros."""
    found: dict[str, Tensor] = {}
    for node in program.nodes(part):
        if node.op == "get_attr" and node.target not in program.constants:
            size = tuple(int(n) for n in node.meta["val"].shape)
            name = str(node.target)
            if name.endswith("_trans"):
                found[name] = torch.eye(size[0])
            elif name.endswith(CHANNELS[0]):
                found[name] = torch.full(size, -1)
            else:
                found[name] = torch.ones(size) if name.endswith(LEAF) else torch.zeros(size)
    return found
