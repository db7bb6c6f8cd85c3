"""Proof on the twin: what has no local boundary is proved on the whole narrow model, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .certificate import LIMIT
from .contract import EXACT, Pass
from .edit import apply, by_module
from .errors import NotEquivalent, Refused
from .execute import execute, inputs_of
from .operand import Slot
from .plan import Plan, make_plan
from .program import Program
from .proof import neutral

TOKENS = (2, 12)
"""Batch and length of the proof; the first row is padded on the left."""


def prove_on_twin(plan: Plan) -> str:
    """Apply the EXACT passes to the twin, up to the last rotation that crosses blocks, and compare the logits.

    Unknown scales are drawn at random.

    Returns what was proved, for the journal. Raises NotEquivalent when the function changed.
    """
    twin = plan.program.twin
    across = [step.index for step in plan.steps if any(rewrite.basis for rewrite in step.answer.rewrites)]
    if not across:
        return "every rewrite has a local boundary: nothing to prove on the twin"
    if twin is None:
        return "not proved on the twin: this capture has none"
    upto = plan.steps[: max(across) + 1]  # what comes later is proved block by block
    exact: list[Pass] = [step.what for step in upto if step.what.claim is EXACT and step.answer.rewrites]
    try:
        small = make_plan(twin, exact, scheme=plan.scheme, target=plan.target, tp=1, seed=plan.seed)
    except Refused as error:
        return f"not proved on the twin: {error}"
    refused = [problem for step in small.steps for problem in step.answer.problems]
    if refused:
        return f"not proved on the twin: {refused[0]}"
    source = dict(twin.source.load(twin.source.names()))
    before = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in source.items()
    }
    error = difference(twin, before, small)
    names = ", ".join(one.name for one in exact)
    if not error < LIMIT:
        raise NotEquivalent(
            f"{names}: on the twin (the same architecture, narrow, random weights) the passes change the logits by "
            f"{error:.2g} (relative, float64; limit {LIMIT:g}). No weight was read and nothing was written"
        )
    return f"{names} keep the twin's logits (relative error below {LIMIT:g}, float64)"


def difference(twin: Program, before: Mapping[str, Tensor], small: Plan) -> float:
    """Relative Frobenius error of the twin's logits after all rewrites of a plan."""
    generator = torch.Generator().manual_seed(small.seed)
    after = dict(before)
    for name, owner in twin.ties.items():
        after.setdefault(name, before[owner])
    for step in small.steps:
        for rewrite in step.answer.rewrites:
            values: dict[Slot, Any] = {
                slot: torch.rand(slot.shape, generator=generator, dtype=torch.float64) + 0.5
                for slot in rewrite.slots
            }
            state = dict(after)
            for module, edits in by_module(rewrite.edits).items():
                new = apply(twin, module, edits, values, state.get, torch.float64)
                after.update({f"{module}.{local}": tensor for local, tensor in new.items()})
    high = min(leaf.parameters["weight"][0] for leaf in twin.leaves.values() if leaf.kind == "embedding")
    ids = torch.randint(0, high, TOKENS, generator=generator)
    mask = torch.ones_like(ids)
    mask[0, : TOKENS[1] // 3] = 0
    want, got = (
        logits(program, tensors, ids, mask) for program, tensors in ((twin, before), (small.final, after))
    )
    keep = mask.bool()
    return float(torch.linalg.vector_norm((got - want)[keep]) / torch.linalg.vector_norm(want[keep]))


def logits(program: Program, tensors: Mapping[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """The whole program in float64."""
    env: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    result: Tensor | None = None
    with torch.no_grad():
        for part in program.parts:
            held = {**neutral(program, part), **tensors}
            inputs = {node: env[node.name] for node in inputs_of(program, part)}
            for node, value in execute(program, part, held, inputs, dtype=torch.float64).items():
                env[node.name] = result = value
    assert result is not None
    return result
