"""Leave one out: the error of every block under calibration sets that differ by a sample, in one sweep of the model.

Every sample is observed once. The statistics of a set are those of its samples joined, so a set without one sample
costs no other run of it; unknowns are solved again from the joined statistics, and the error of each block is measured
on a few sequences that are in none of the sets compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..runtime.quantized import QuantizedLinear
from .contract import Rewrite
from .edit import Verb, apply, by_module
from .errors import Failed
from .fake_quant import quantized_linears
from .input_maps import InputMap, moved
from .laws import shape
from .observe import Observers, made
from .operand import Quantize, Statistic, Stub
from .part_work import cast, check_values, online_linears, own_names, planned_linears, restricted
from .plan import Plan
from .program import Part
from .resident import release
from .roles import mixtures, peers, read_together
from .scheme import LinearScheme
from .solve import Progress, Work
from .statistics import Observed
from .streams import Stream, Values, needed_after, prologue
from .view import BlockView


@dataclass(frozen=True)
class Trial:
    """A calibration set, and the sequences on which its solution is judged; numbers of sequences."""

    members: frozenset[int]
    judged: tuple[int, ...]


@dataclass
class _State:
    """What one solution has made of a block so far."""

    tensors: dict[str, Tensor]
    quantized: dict[str, QuantizedLinear] = field(default_factory=dict)
    schemes: dict[str, LinearScheme] = field(default_factory=dict)
    stubs: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, InputMap] = field(default_factory=dict)

    def copy(self) -> _State:
        """One that can go another way; tensors are never changed in place."""
        return _State(
            dict(self.tensors), dict(self.quantized), dict(self.schemes), dict(self.stubs), dict(self.maps)
        )


@dataclass
class _Seen:
    """What was observed before one step, in the state of the first trial."""

    wanted: list[Statistic]
    samples: dict[int, Mapping[Statistic, Observed]]
    maps: dict[str, InputMap]
    values: dict[Statistic, Tensor] = field(default_factory=dict)
    """Of the first trial's set."""


@torch.no_grad()
def block_errors(
    plan: Plan, sequences: Sequence[Tensor], trials: Sequence[Trial], compute: torch.dtype,
    report: Callable[[Progress], None] = lambda progress: None,
) -> list[dict[int, float]]:  # fmt: skip
    """For each trial the error of the quantized blocks on each sequence that judges it, summed over blocks.

    The error of a block on a sequence is the mean over its tokens of ``|y' - y|² / |y|²``: y is what the float block
    hands on, y' what the block with its linears (and grids) as they were solved makes of the same float input.

    Args:
        plan: Passes that train are not in it.
        sequences: Token ids [1, t], t of its own for each.
        trials: The first is the one in whose state the samples are observed: give the largest set.
        compute: Dtype of the runs.
        report: Told of the progress.
    """
    found: list[dict[int, float]] = [dict.fromkeys(trial.judged, 0.0) for trial in trials]
    program, needed = plan.program, needed_after(plan.program)
    last = max(part.index for part in program.blocks)
    stream: Stream | None = None
    for part in program.parts[: last + 1]:
        release()
        report(Progress(part.name, part.index, last + 1, "observe"))
        tensors = _load(plan, part)
        if stream is None:
            stream = _embedded(plan, tensors, sequences, compute)
            continue
        block = _Block(plan, part, tensors, stream, compute)
        outputs = block.observe(trials[0].members, frozenset().union(*(trial.members for trial in trials)))
        own = block.errors(block.states[-1], {q for trial in trials for q in trial.judged})
        for number, trial in enumerate(trials):
            if number % 8 == 0:
                report(Progress(part.name, part.index, last + 1, f"set {number} of {len(trials)}"))
            state = block.solved(trial.members)
            errors = own if state is None else block.errors(state, trial.judged)
            for q in trial.judged:
                found[number][q] += errors[q]
        stream.advance(outputs, needed[part.index])
    return found


def _load(plan: Plan, part: Part) -> dict[str, Tensor]:
    """The tensors of a part, float32; grids of attentions are zero, which changes nothing."""
    source = plan.program.source
    tensors: dict[str, Tensor] = {}
    for name, tensor in source.load(own_names(plan.program, part)).items():
        source.check_finite(name, tensor)
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    for node in plan.final.nodes(part):
        if node.meta.get("stub"):
            tensors[str(node.target)] = torch.zeros(shape(node))
    return tensors


def _embedded(
    plan: Plan, tensors: Mapping[str, Tensor], sequences: Sequence[Tensor], compute: torch.dtype
) -> Stream:
    """All sequences at the entrance of the first block, one a microbatch."""
    streams = [prologue(plan.program, tensors, ids, 1, compute, plan.bases) for ids in sequences]
    return Stream(plan.bases, compute, [batch for stream in streams for batch in stream.batches])


class _Block:
    """One block while its inputs are there: samples observed, then solved for one set after another."""

    def __init__(
        self, plan: Plan, part: Part, tensors: dict[str, Tensor], stream: Stream, compute: torch.dtype
    ) -> None:
        self.plan, self.part, self.stream, self.compute = plan, part, stream, compute
        self.work = [Work(step, restricted(step, plan.program, part)) for step in plan.steps]
        self.work = [work for work in self.work if work.rewrites]
        self.peers = peers(mixtures(plan.program))
        self.transposed = frozenset(name for name, leaf in plan.program.leaves.items() if leaf.transposed)
        self.planned, self.online = planned_linears(plan), online_linears(plan)
        self.original = tensors
        self.states = [_State(tensors)]
        """Before each piece of work, and after the last, of the first trial."""
        self.seen: list[_Seen] = []
        self.outputs: list[Values] = []
        self.routes: dict[tuple[int, str], Tensor] = {}

    def observe(self, first: frozenset[int], members: frozenset[int]) -> list[Values]:
        """Observe all members before each piece of work, solve for the first set; returns the float outputs."""
        original = self._run(replace(self.plan.steps[0], program=self.plan.program, bases=()), self.original)
        self.outputs = [original(index) for index in range(len(self.stream.batches))]
        for work in self.work:
            state = self.states[-1].copy()
            wanted = list(
                dict.fromkeys(n for rewrite in work.rewrites for s in rewrite.slots for n in s.needs)
            )
            seen = _Seen(wanted, {}, dict(state.maps))
            if wanted:
                for index in sorted(members):
                    observers = Observers(wanted, self.peers)
                    self._run(work.step, state.tensors)(index, observers)
                    seen.samples[index] = observers.seen
                seen.values = self._joined(seen, first)
            self.seen.append(seen)
            self._solve(work, state, seen.values)
            self.states.append(state)
        return self.outputs

    def solved(self, members: frozenset[int]) -> _State | None:
        """The block as it is solved for a set; None where that is what the first set's solution is."""
        state: _State | None = None
        for number, (work, seen) in enumerate(zip(self.work, self.seen, strict=True)):
            values = self._joined(seen, members)
            if state is None and all(torch.equal(value, seen.values[need]) for need, value in values.items()):
                continue
            state = state or self.states[number].copy()
            self._solve(
                work, state, {need: self._moved(need, value, seen, state) for need, value in values.items()}
            )
        return state

    def errors(self, state: _State, sequences: Iterable[int]) -> dict[int, float]:
        """Of the block in a state, on some sequences."""
        hook = quantized_linears(state.quantized, state.schemes, self.compute)
        step = replace(self.plan.steps[-1], program=self.plan.final, bases=self.plan.bases)
        run = self._run(step, {**state.tensors, **state.stubs})
        return {index: _error(run(index, hook), self.outputs[index]) for index in sequences}

    def _run(self, step: Any, tensors: Mapping[str, Tensor]) -> Callable[..., Values]:
        """The block on one sequence in a state of the program; rows go to the experts that the float model chooses."""
        held = cast(tensors, self.compute)

        def run(index: int, linear: Any = None) -> Values:
            route = lambda node, own, experts: self.routes.setdefault((index, node), own)  # noqa: E731
            on_value = linear.on_value if isinstance(linear, Observers) else None
            return self.stream.run(index, step.program, self.part, held, step.bases, linear, route, on_value)

        return run

    def _joined(self, seen: _Seen, members: frozenset[int]) -> dict[Statistic, Tensor]:
        """The statistics of a set."""
        if not seen.wanted:
            return {}
        observers = Observers(seen.wanted, self.peers)
        for statistic in seen.wanted:
            own = [seen.samples[i][statistic] for i in sorted(members) if statistic in seen.samples[i]]
            if own:
                joined = observers.seen[statistic] = made(statistic)
                for one in own:
                    joined.join(one)
        return observers.results()

    def _moved(self, need: Statistic, value: Tensor, seen: _Seen, state: _State) -> Tensor:
        """A statistic that was observed on the first set's inputs, on those that this state has."""
        here, there = seen.maps.get(need.module), state.maps.get(need.module)
        if here is None or there is None or here.mixed != there.mixed:
            return value
        return moved(need, value, *here.to(there))

    def _solve(self, work: Work, state: _State, statistics: Mapping[Statistic, Tensor]) -> None:
        """Fill the slots of a piece of work and apply its edits."""
        view = BlockView(
            self.part.name, state.tensors, statistics, self.plan.dtype, self.plan.seed,
            together=read_together(work.step.program).__getitem__, transposed=self.transposed,
            quantized=state.quantized, schemes=state.schemes, planned=self.planned, online=self.online,
        )  # fmt: skip
        for rewrite in work.rewrites:
            values = dict(work.step.what.solve(rewrite, view))
            check_values(rewrite, values)
            self._apply(rewrite, values, state)

    def _apply(self, rewrite: Rewrite, values: Mapping[Any, Any], state: _State) -> None:
        before = dict(state.tensors)
        for module, edits in by_module(
            e for e in rewrite.edits if e.verb not in (Verb.STUB, Verb.SWAP)
        ).items():
            leaf = self.plan.program.leaves[module]
            if leaf.kind == "linear":
                known = state.maps.get(module) or InputMap.identity(
                    leaf.parameters["weight"][int(not leaf.transposed)]
                )
                for edit in edits:
                    known = known.after(leaf, edit, values, before.get)
                state.maps[module] = known
            new = apply(self.plan.program, module, edits, values, before.get, torch.float64)
            state.tensors.update({f"{module}.{local}": tensor.float() for local, tensor in new.items()})
        for edit in rewrite.edits:
            if isinstance(edit.operand, Quantize):
                state.quantized[edit.site.module] = values[edit.operand.slot]
                state.schemes[edit.site.module] = edit.operand.scheme
            elif isinstance(edit.operand, Stub):
                kinds = (torch.float32, torch.int8 if edit.operand.kind == "fa" else torch.float32)
                for leaf, tensor, kind in zip(
                    edit.operand.leaves, values[edit.operand.slot], kinds, strict=True
                ):
                    name = f"{edit.site.module}.{leaf}"
                    state.stubs[name] = tensor.reshape(state.tensors[name].shape).to(kind)


def _error(got: Values, want: Values) -> float:
    """Mean over tokens of the squared error over the squared size of what a block hands on."""
    total, count = 0.0, 0
    for name, value in want.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            noise = (got[name].float() - value.float()).square().sum(-1)
            size = value.float().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            total, count = total + float((noise / size).double().sum()), count + noise.numel()
    if not count:
        raise Failed("a block hands on no float value: there is no error to measure")
    return total / count
