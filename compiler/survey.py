"""Survey: a run of the float model over the calibration text, for passes that have to see all of it first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from .contract import Pass, Rewrite
from .execute import Observer
from .observe import Observers
from .part_work import cast, own_names
from .plan import Plan
from .program import Part, Program
from .resident import release
from .streams import needed_after, prologue
from .view import BlockView, LinearHook


def survey(
    plan: Plan, ids: Tensor, microbatch: int, compute: torch.dtype, report: Callable[[Part], None]
) -> Iterator[tuple[Pass, Rewrite, Mapping[str, float]]]:
    """Stream the weights once and hand each asking pass one part after another; yields what each concludes.

    Args:
        plan: Its program is run as it is before all passes.
        ids: Calibration tokens [n, length].
        microbatch: Sequences that run at once.
        compute: Dtype of the run.
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

    for part, tensors in float_blocks(plan.program, ids, microbatch, compute, watch):
        view = BlockView(part.name, tensors, kept.pop(part.name).results(), plan.dtype, plan.seed)
        for what, rewrite, _ in asking:
            what.survey(rewrite, view)
    for what, rewrite, _ in asking:
        yield what, rewrite, what.learn(rewrite)


def float_blocks(
    program: Program, ids: Tensor, microbatch: int, compute: torch.dtype,
    watch: Callable[[Part], tuple[LinearHook | None, Observer | None]],
) -> Iterator[tuple[Part, Mapping[str, Tensor]]]:  # fmt: skip
    """Run block after block over the calibration tokens, each watched; yields each one, and its float32 tensors."""
    needed, stream = needed_after(program), None
    last = max(part.index for part in program.blocks)
    for part in program.parts[: last + 1]:
        release()
        tensors: dict[str, Tensor] = {}
        for name, tensor in program.source.load(own_names(program, part)).items():
            program.source.check_finite(name, tensor)
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        if stream is None:
            stream = prologue(program, tensors, ids, microbatch, compute, ())
            continue
        linear, on_value = watch(part)
        used = cast(tensors, compute)
        with torch.no_grad():
            outputs = [
                stream.run(i, program, part, used, (), linear, None, on_value)
                for i in range(len(stream.batches))
            ]
        yield part, tensors
        stream.advance(outputs, needed[part.index])
