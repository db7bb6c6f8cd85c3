"""State sweep: the divergence of the model as it is after some of a plan's rewrites, several such states in one solve.

Each state has a stream of its own from the embedding to the logits, in its own basis, beside that of the float model.
Values are those that the solve of the whole plan finds: a pass is solved once, whatever the number of states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from .contract import Rewrite
from .edit import Verb
from .fake_quant import quantized_linears
from .graph_edit import rewritten
from .logit_divergence import divergences_of
from .part_state import PartState
from .part_work import cast
from .plan import Plan, Step
from .program import Part
from .solve import Progress, Solved
from .streams import Stream, needed_after, prologue


@dataclass(frozen=True)
class State:
    """The model after all steps before one, and after that one at some of its places."""

    step: int
    """Index of the step."""
    places: frozenset[str]


def places_of(step: Step) -> tuple[str, ...]:
    """The places at which a step can be undone by itself: linears that are made integer, else whole rewrites."""
    found: dict[str, None] = {}
    for rewrite in step.answer.rewrites:
        found |= dict.fromkeys(rewrite.modules if _of_linears(rewrite) else (rewrite.where,))
    return tuple(found)


def at_places(rewrites: Iterable[Rewrite], places: frozenset[str]) -> tuple[Rewrite, ...]:
    """The rewrites, or the parts of them, that lie at some places."""
    found = []
    for rewrite in rewrites:
        if not _of_linears(rewrite):
            found += [rewrite] if rewrite.where in places else []
        elif edits := tuple(edit for edit in rewrite.edits if edit.site.module in places):
            found.append(replace(rewrite, edits=edits))
    return tuple(found)


def _of_linears(rewrite: Rewrite) -> bool:
    return all(edit.verb is Verb.SWAP for edit in rewrite.edits)


@dataclass
class StateSweep:
    """Watches the steps of a solve (``Solver.on_step``)."""

    plan: Plan
    states: Sequence[State]
    ids: Tensor
    """Tokens [n, length]; a sequence runs at a time."""
    compute: torch.dtype
    stored: Callable[[str, Tensor], Tensor]
    """A float tensor, by name, in the dtype in which it is exported."""
    report: Callable[[Progress], None] = lambda progress: None
    divergences: list[float] = field(default_factory=list)
    """KL(float || state) in nats per token, once the last part has run; infinite where a state computes NaN."""

    def __post_init__(self) -> None:
        steps = self.plan.steps
        self.programs = [
            rewritten(steps[one.step].program, at_places(steps[one.step].answer.rewrites, one.places))
            for one in self.states
        ]
        self.needed = [needed_after(program) for program in (self.plan.program, *self.programs)]
        self.streams = [Stream((), self.compute) for _ in self.needed]
        """The float model first."""
        self.divergences = [0.0] * len(self.states)
        self.waiting: list[int] = []
        self.part = -1
        self.head: dict[str, Tensor] = {}
        """The last part of the float model."""

    def __call__(self, part: Part, step: Step | None, state: PartState, solved: Sequence[Solved]) -> None:
        """Take in a step of one part: the state before it, and what was solved; no step is the end of the part."""
        if part.index != self.part:
            self.part, self.waiting = part.index, list(range(len(self.states)))
            self.report(
                Progress(part.name, part.index, len(self.plan.program.parts), f"{len(self.states)} states")
            )
            self._float(part, state)
        for index in list(self.waiting):
            at = self.states[index].step
            if step is not None and at > step.index:
                continue
            own = state
            if step is not None and at == step.index:
                own = state.copy()
                for rewrite, values in solved:
                    for kept in at_places((rewrite,), self.states[index].places):
                        own.apply(kept, values)
            self.waiting.remove(index)
            self._advance(index, part, own)

    def _float(self, part: Part, state: PartState) -> None:
        rows = {name: table.full for name, table in state.rowwise.items()}
        tensors = cast({**state.tensors, **rows}, self.compute)
        if part.index == len(self.plan.program.parts) - 1:
            self.head = tensors
        else:
            self._run(0, part, tensors)

    def _advance(self, index: int, part: Part, state: PartState) -> None:
        program = self.plan.program
        tables = {
            name: rows.finished(program, self.plan.dtype).to(self.plan.dtype)
            for name, rows in state.rowwise.items()
        }
        floats = {name: self.stored(name, tensor) for name, tensor in {**state.tensors, **tables}.items()}
        tensors = cast({**floats, **state.stubs}, self.compute)
        if part.index == len(program.parts) - 1:
            self.divergences[index] = self._divergence(index, part, tensors)
        else:
            self._run(index + 1, part, tensors, state)

    def _run(
        self, number: int, part: Part, tensors: Mapping[str, Tensor], state: PartState | None = None
    ) -> None:
        """Take one stream through a part."""
        program = (self.plan.program, *self.programs)[number]
        if part.index == 0:
            self.streams[number] = prologue(program, tensors, self.ids, 1, self.compute, ())
            return
        hook = quantized_linears(state.quantized, state.schemes, self.compute) if state else None
        stream = self.streams[number]
        outputs = stream.outputs(program, part, tensors, hook)
        stream.advance(outputs, self.needed[number][part.index])

    def _divergence(self, index: int, part: Part, tensors: Mapping[str, Tensor]) -> float:
        original, own = self.streams[0], self.streams[index + 1]
        (found,) = divergences_of(
            partial(original.logits, program=self.plan.program, part=part, tensors=self.head),
            [partial(own.logits, program=self.programs[index], part=part, tensors=tensors)],
            len(original.batches),
        )
        return found
