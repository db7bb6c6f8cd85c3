"""Divergences: what rounding each linear costs in what the model says, for ``qc analyze --metric kl``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .menu import Place
from .nearest import rounding_plan
from .noise_sweep import TOKENS, NoiseSweep
from .operand import Quantize
from .program import Program
from .scheme import Scheme
from .solve import Progress, Solver


def divergences(
    program: Program, ids: Tensor, scheme: Scheme, compute: torch.dtype = torch.float32, *, by_layer: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, float]:  # fmt: skip
    """KL of the logits that rounding each linear to nearest costs, in nats per token: see ``noise_sweep``.

    Args:
        program: The float model.
        ids: Calibration tokens [n, length]; the first `TOKENS` run.
        scheme: Formats; linears that it leaves float are not among the results.
        compute: Dtype of the run.
        by_layer: Blocks instead of linears; a block is the sum of its linears.
        report: Told of the progress.
    """
    ids = ids[: max(1, TOKENS // ids.shape[1])]
    trial = rounding_plan(program, scheme)
    parts = {str(node.target): node.meta["part"] for node in program.graph.nodes if node.op == "call_module"}
    edits = [edit for rewrite in trial.steps[0].answer.rewrites for edit in rewrite.edits]
    places = [
        Place((edit.site.module,), parts[edit.site.module], (edit.operand.scheme,), (0,))
        for edit in edits
        if isinstance(edit.operand, Quantize)
    ]
    sweep = NoiseSweep(program, places, ids, compute, report)
    Solver(trial, ids, lambda name, tensor: None, compute=compute, report=report, watch=sweep).run()
    names = {part.index: part.name for part in program.parts}
    found: dict[str, float] = {}
    for place, (cost,) in zip(places, sweep.costs(), strict=True):
        name = names[place.part] if by_layer else place.linears[0]
        found[name] = found.get(name, 0.0) + cost
    return found
