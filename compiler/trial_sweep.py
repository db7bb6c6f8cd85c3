"""Trial sweep: the divergence of whole choices of formats, several in one run, rounding to nearest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .fake_quant import quantized_linears
from .logit_divergence import divergences_of
from .menu import uniform
from .nearest import Nearest
from .observe import Observers
from .part_work import cast
from .program import Part, Program
from .roles import mixtures, peers
from .scheme import LinearScheme
from .solve import Progress
from .streams import Stream, needed_after, prologue


@dataclass
class TrialSweep:
    """Watches a solve of the float rewrites (``Solver.watch``); each choice has a stream of its own beside float."""

    program: Program
    """After all float rewrites, without integers."""
    choices: Sequence[Mapping[str, LinearScheme]]
    """Format of every linear that has one."""
    ids: Tensor
    """Tokens [n, length]."""
    compute: torch.dtype
    report: Callable[[Progress], None] = lambda progress: None
    divergences: list[float] = field(default_factory=list)
    """KL(float || choice) in nats per token, once the last part has run; infinite where one computes NaN."""

    def __post_init__(self) -> None:
        formats = dict.fromkeys(one for choice in self.choices for one in choice.values() if one.quantized)
        self.nearest = {one: Nearest(self.program, uniform(one)) for one in formats}
        self.needed = needed_after(self.program)
        self.peers = peers(mixtures(self.program))
        self.streams: list[Stream] = []
        """The float model first."""

    def __call__(self, part: Part, tensors: Mapping[str, Tensor]) -> None:
        """Take in one part, with its float32 tensors as the passes left them."""
        what = f"{len(self.choices)} choices of formats"
        self.report(Progress(part.name, part.index, len(self.program.parts), what))
        if part.index == 0:
            first = prologue(self.program, tensors, self.ids, 1, self.compute, ())
            self.streams = [
                Stream((), self.compute, list(first.batches)) for _ in range(1 + len(self.choices))
            ]
        elif part.index == len(self.program.parts) - 1:
            self._logits(part, cast(tensors, self.compute))
        else:
            self._block(part, tensors)

    def _block(self, part: Part, tensors: Mapping[str, Tensor]) -> None:
        lowered, needed = cast(tensors, self.compute), self.needed[part.index]
        own = {str(node.target) for node in self.program.nodes(part) if node.op == "call_module"}
        chosen = [{name: one for name, one in choice.items() if name in own} for choice in self.choices]
        names = {
            one: list(dict.fromkeys(n for c in chosen for n in c if c[n] == one)) for one in self.nearest
        }
        needs = (
            need for one, linears in names.items() for n in linears for need in self.nearest[one].needs(n)
        )
        observers = Observers(needs, self.peers)
        float_outputs = self.streams[0].outputs(self.program, part, lowered, observers)
        statistics = observers.results() if observers.wanted else {}
        integers = {
            one: self.nearest[one].of(part.name, tensors, ns, statistics)[0] for one, ns in names.items()
        }
        for stream, choice in zip(self.streams[1:], chosen, strict=True):
            mine = {name: one for name, one in choice.items() if one.quantized}
            hook = quantized_linears(
                {name: integers[one][name] for name, one in mine.items()}, mine, self.compute
            )
            stream.advance(stream.outputs(self.program, part, lowered, hook), needed)
        self.streams[0].advance(float_outputs, needed)

    def _logits(self, part: Part, tensors: Mapping[str, Tensor]) -> None:
        original, *others = (
            partial(stream.logits, program=self.program, part=part, tensors=tensors)
            for stream in self.streams
        )
        self.divergences = divergences_of(original, others, len(self.streams[0].batches))
