"""Survey: a run of the float model over the calibration text, for passes that have to see all of it first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from .contract import Pass, Rewrite
from .observe import Observers
from .part_work import cast, own_names
from .plan import Plan
from .program import Part
from .resident import release
from .streams import needed_after, prologue
from .view import BlockView


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
    program, needed = plan.program, needed_after(plan.program)
    last = max(part.index for part in program.blocks)
    stream = None
    for part in program.parts:
        if part.index > last:
            break
        release()
        report(part)
        tensors: dict[str, Tensor] = {}
        for name, tensor in program.source.load(own_names(program, part)).items():
            program.source.check_finite(name, tensor)
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        if stream is None:
            stream = prologue(program, tensors, ids, microbatch, compute, ())
            continue
        inside = {str(node.target) for node in program.nodes(part)}
        observers = Observers(one for _, _, wanted in asking for one in wanted if one.module in inside)
        used = cast(tensors, compute)
        with torch.no_grad():
            outputs = [stream.run(i, program, part, used, (), observers) for i in range(len(stream.batches))]
        view = BlockView(part.name, tensors, observers.results(), plan.dtype, plan.seed)
        for what, rewrite, _ in asking:
            what.survey(rewrite, view)
        stream.advance(outputs, needed[part.index])
    for what, rewrite, _ in asking:
        yield what, rewrite, what.learn(rewrite)
