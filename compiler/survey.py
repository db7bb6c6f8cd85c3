"""Survey: a run of the float model over the calibration text, for passes that have to see all of it first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .contract import Pass, Rewrite
from .device import CPU, Mirror, moved
from .execute import Observer
from .observe import Observers
from .part_work import cast, own_names
from .plan import Plan
from .program import Part, Program
from .resident import release
from .streams import Stream, Values, needed_after, prologue
from .view import BlockView, LinearHook


def survey(
    plan: Plan, ids: Tensor, microbatch: int, compute: torch.dtype, device: torch.device,
    report: Callable[[Part], None],
) -> Iterator[tuple[Pass, Rewrite, Mapping[str, float]]]:  # fmt: skip
    """Stream the weights once and hand each asking pass one part after another; yields what each concludes.

    Args:
        plan: Its program is run as it is before all passes.
        ids: Calibration tokens [n, length].
        microbatch: Sequences that run at once.
        compute: Dtype of the run.
        device: Where blocks run.
        report: Told of each part as it begins.

    Nothing is read where no pass asks (``Pass.surveys``).
    """
    asking = [
        (step.what, rewrite, wanted)
        for step in plan.steps
        for rewrite in step.answer.rewrites
        if (wanted := step.what.surveys(rewrite))
    ]
    if not asking:
        return
    kept: dict[str, Observers] = {}

    def watch(part: Part) -> tuple[LinearHook, None]:
        report(part)
        inside = {str(node.target) for node in plan.program.nodes(part)}
        wanted = (one for _, _, needs in asking for one in needs if one.module in inside)
        return kept.setdefault(part.name, Observers(wanted)), None

    for block in float_blocks(plan.program, ids, microbatch, compute, watch, device):
        statistics = moved(kept.pop(block.part.name).results(), device)
        view = BlockView(block.part.name, block.tensors, statistics, plan.dtype, plan.seed, device)
        for what, rewrite, _ in asking:
            what.survey(rewrite, view)
    for what, rewrite, _ in asking:
        yield what, rewrite, what.learn(rewrite)


class Run(Protocol):
    """Runs a block over all microbatches, each linear replaced by a hook, each value shown to an observer."""

    def __call__(self, linear: LinearHook | None = None, on_value: Observer | None = None) -> list[Values]:
        """What the block hands on, microbatch by microbatch."""
        ...


@dataclass
class FloatBlock:
    """One block of the float model while its inputs are there."""

    part: Part
    tensors: Mapping[str, Tensor]
    """Float32, by qualified name, where the block runs."""
    run: Run
    outputs: list[Values] = field(default_factory=list)
    """Of the watched run."""

    def weight(self, program: Program, linear: str) -> Tensor:
        """Weight of a linear [out, in], float32."""
        weight = self.tensors[f"{linear}.weight"]
        return weight.T if program.leaves[linear].transposed else weight


def float_blocks(
    program: Program, ids: Tensor, microbatch: int, compute: torch.dtype,
    watch: Callable[[Part], tuple[LinearHook | None, Observer | None]], device: torch.device = CPU,
) -> Iterator[FloatBlock]:  # fmt: skip
    """Run block after block over the calibration tokens, each watched; yields each one that ran."""
    needed, stream = needed_after(program), None
    last = max(part.index for part in program.blocks)
    for part in program.parts[: last + 1]:
        release()
        tensors: dict[str, Tensor] = {}
        for name, tensor in program.source.load(own_names(program, part)).items():
            program.source.check_finite(name, tensor)
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        if stream is None:
            stream = prologue(program, tensors, ids, microbatch, compute, (), device)
            continue
        linear, on_value = watch(part)
        near = Mirror(tensors, device)
        block = FloatBlock(part, near, _runner(stream, program, part, cast(near, compute)))
        block.outputs = block.run(linear, on_value)
        yield block
        stream.advance(block.outputs, needed[part.index])


def _runner(stream: Stream, program: Program, part: Part, tensors: Mapping[str, Tensor]) -> Run:
    @torch.no_grad()
    def run(linear: LinearHook | None = None, on_value: Observer | None = None) -> list[Values]:
        batches = range(len(stream.batches))
        return [stream.run(i, program, part, tensors, (), linear, None, on_value) for i in batches]

    return run
