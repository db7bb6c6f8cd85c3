"""Solve: stream the weights part by part, fill the unknowns, prove, quantize and hand the tensors on.

Per part: load its weights as float32; for each pass in order collect the statistics that its unknowns need on
the state of the program that the pass sees, solve, prove, apply; then write, compute what the next part reads,
and forget. Peak memory is a few times one block, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..runtime.quantized import QuantizedLinear
from .contract import EXACT, Rewrite
from .device import CPU, Mirror, explained, moved
from .edit import Verb, by_module
from .execute import Route
from .fake_quant import quantized_linears
from .journal import Journal, Told
from .observe import Observers, RowCounts
from .operand import Slot, Statistic
from .part_state import PartState
from .part_work import (
    cast,
    check_values,
    loaded,
    main_value,
    online_linears,
    own_names,
    planned_linears,
    restricted,
)
from .plan import Plan, Step
from .program import Part
from .proof import Prover
from .resident import release
from .roles import mixtures, peers, read_together, roles_of
from .scheme import LinearScheme
from .streams import Stream, Values, needed_after, prologue
from .survey import survey
from .view import BlockView
from .walk import Walk, walk_over

MICROBATCH = 1024
"""Tokens of a microbatch: enough for the speed of matrix products, few enough for memory."""

Sink = Callable[[str, Tensor], None]
"""Takes one finished tensor: its qualified name in the model, and the tensor as it is stored."""

Watch = Callable[[Part, Mapping[str, Tensor]], None]
"""Sees each part once all passes are done with it, with its tensors as they left them: float32, tables as they run."""

Solved = tuple[Rewrite, Mapping[Slot, Any]]
"""A rewrite, with the edits of one part, and what its slots were filled with."""
StepWatch = Callable[[Part, Step | None, PartState, Sequence[Solved]], None]
"""Sees each part after every step that rewrites it: the state before that step, and what was solved in it. At the end
of the part it sees the final state, with no step."""


@dataclass(frozen=True)
class Progress:
    """What is being worked on, for whoever shows it."""

    part: str
    index: int
    total: int
    what: str


@dataclass(frozen=True)
class Work:
    """The part of a step that lies in one part of the program."""

    step: Step
    rewrites: tuple[Rewrite, ...]


class Solver:
    """One solve of a plan. ``ids`` are calibration tokens [n, length]; ``compute`` the dtype of calibration runs."""

    def __init__(
        self, plan: Plan, ids: Tensor, sink: Sink, *, compute: torch.dtype,
        report: Callable[[Progress], None] = lambda progress: None, watch: Watch | None = None,
        on_step: StepWatch | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.ids, self.sink, self.compute, self.watch = plan, ids, sink, compute, watch
        self.on_step = on_step
        self.microbatch = max(1, (plan.run.tokens if plan.run else MICROBATCH) // ids.shape[1])
        self.device = plan.device
        self.report = report
        self.journal = Journal()
        self.needed = needed_after(plan.program)
        self.prover = Prover(plan, ids)
        self.quantizes_inputs = any(step.what.propagates_quantized for step in plan.steps)
        self.held = {name: tensor.dtype for name, tensor in plan.program.root.state_dict().items()}
        self.planned, self.online = planned_linears(plan), online_linears(plan)
        self.float_stream: Stream | None = None
        self.quantized_stream: Stream | None = None

    def run(self) -> Journal:
        """Solve and hand on every part, in order."""
        parts = self.plan.program.parts
        with explained(self.device, "the run before the first block"):
            self._survey()
        for part in parts:
            self.report(Progress(part.name, part.index, len(parts), "load"))
            with explained(self.device, part.name):
                _PartSolver(self, part).run()
            release()
        self._pass_on()
        return self.journal

    def _survey(self) -> None:
        """Let passes that want to know the whole model first look at it."""
        parts = self.plan.program.parts
        for what, rewrite, measures in survey(
            self.plan, self.ids, self.microbatch, self.compute, self.device,
            lambda part: self.report(Progress(part.name, part.index, len(parts), "survey")),
        ):  # fmt: skip
            self.journal.learned(what.name, rewrite.where, measures)

    def exported(self, name: str, tensor: Tensor) -> Tensor:
        """A float tensor in the dtype in which it is announced: one that the model keeps in its own dtype keeps it."""
        held = self.held.get(name)
        kept = held is not None and held != self.plan.program.dtype
        dtype = self.plan.program.source.dtype(name) if kept else self.plan.dtype
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def _pass_on(self) -> None:
        """Hand on the tensors that nothing in the graph reads (a vision tower, unused cross attention) as they are."""
        program = self.plan.program
        read = {name for part in program.parts for name in own_names(program, part)}
        for name in program.source.names():
            if name not in read and name not in self.plan.final.ties:
                (tensor,) = program.source.load([name]).values()
                program.source.check_finite(name, tensor)
                self.sink(name, self.exported(name, tensor))


class _PartSolver:
    """The state of one part while its passes are solved."""

    def __init__(self, solver: Solver, part: Part) -> None:
        self.solver, self.plan, self.part = solver, solver.plan, part
        self.is_block = part.kind >= 0
        self.work = [Work(step, restricted(step, self.plan.program, part)) for step in self.plan.steps]
        self.quantized: dict[str, QuantizedLinear] = {}
        self.schemes: dict[str, LinearScheme] = {}
        self.outputs: list[Values] | None = None
        self.walked: Walk | None = None  # of the last step that rewrites this part, over quantized inputs
        own = {str(node.target) for node in self.plan.program.nodes(part) if node.op == "call_module"}
        self.mixtures = [one for one in mixtures(self.plan.program) if any(n in own for e in one for n in e)]
        self.peers = peers(self.mixtures)
        self.routes: dict[tuple[int, str], Tensor] = {}
        edits = by_module(edit for work in self.work for rewrite in work.rewrites for edit in rewrite.edits)
        self.tensors, self.rowwise = loaded(self.plan, part, edits)
        self.near = Mirror(self.tensors, solver.device)
        """The tensors where the block runs; proofs and edits are made on the host."""
        self.state = PartState(self.plan.program, self.tensors, self.rowwise, self.quantized, self.schemes)

    def run(self) -> None:
        solver = self.solver
        if self.part.index == 0:
            if self.plan.needs_data:
                self._prologue()
            solver.prover.prologue(self.rowwise)
        if self.part.index == len(self.plan.program.parts) - 1:
            solver.prover.sample(self.rowwise)
        proved = solver.prover.start(self.part, self._proof_tensors())
        for work in self.work:
            if not work.rewrites:
                continue
            release()
            self.walked = None
            self._report(work.step.what.name)
            before = None if solver.on_step is None else self.state.copy()
            solved: list[Solved] = []
            view = self._view(work)
            for rewrite in work.rewrites:
                view.measures, view.curves = {}, {}
                with explained(view.device, f"{work.step.what.name} at {rewrite.where}"):
                    values = moved(dict(work.step.what.solve(rewrite, view)), CPU)
                told = Told(view.measures, view.curves)
                check_values(rewrite, values)
                if rewrite.claim is EXACT:
                    certificate = solver.prover.prove(
                        proved, work.step, rewrite, self._proof_tensors(), values
                    )
                    solver.journal.proved(self.part.name, rewrite, rewrite.edits, certificate, told)
                else:
                    solver.journal.changed(self.part.name, rewrite, rewrite.edits, told)
                self.state.apply(rewrite, values)
                if before is not None:
                    solved.append((rewrite, values))
            if solver.on_step is not None and before is not None:
                solver.on_step(self.part, work.step, before, solved)
        self._report("write")
        if any(rewrite.claim is EXACT for work in self.work for rewrite in work.rewrites):
            error = solver.prover.stored(proved, self._proof_tensors(), self.plan.dtype)
            solver.journal.stored(self.part.name, error)
        if self.is_block:
            after = solver.prover.measure(self.part, self.tensors, self.quantized, self.schemes)
            solver.journal.measured(self.part.name, proved.spreads, after)
        if solver.on_step is not None:
            solver.on_step(self.part, None, self.state, ())
        if solver.watch is not None:
            finished = {
                n: rows.finished(self.plan.program, solver.compute) for n, rows in self.rowwise.items()
            }
            solver.watch(self.part, {**self.tensors, **finished})
        self._write()
        self._advance()
        solver.prover.finish(proved)

    def _report(self, what: str) -> None:
        parts = len(self.plan.program.parts)
        self.solver.report(Progress(self.part.name, self.part.index, parts, what))

    def _prologue(self) -> None:
        solver, plan = self.solver, self.plan
        tensors = {**self.tensors, **{name: rows.full for name, rows in self.rowwise.items()}}
        make = lambda: prologue(  # noqa: E731
            plan.program, tensors, solver.ids, solver.microbatch, solver.compute, plan.bases, solver.device
        )
        if plan.runs_float:
            solver.float_stream = make()
        if solver.quantizes_inputs:
            solver.quantized_stream = make()

    def _proof_tensors(self) -> Mapping[str, Tensor]:
        """Float32 tensors, large tables reduced to the rows that proofs look at."""
        if not self.rowwise:
            return self.tensors
        return {
            **self.tensors,
            **{name: rows.sampled(self.plan.program) for name, rows in self.rowwise.items()},
        }

    def _view(self, work: Work) -> BlockView:
        statistics: dict[Statistic, Tensor] = {}
        wanted = [need for rewrite in work.rewrites for slot in rewrite.slots for need in slot.needs]
        if wanted:
            observers = Observers(wanted, self.peers)
            self._run_float(work.step, observers)
            statistics = moved(observers.results(), self.solver.device)
        together = read_together(work.step.program)
        view = BlockView(
            self.part.name,
            self.near,
            statistics,
            self.plan.dtype,
            self.plan.seed,
            self.solver.device,
            together=together.__getitem__,
            transposed=frozenset(name for name, leaf in self.plan.program.leaves.items() if leaf.transposed),
            quantized=Mirror(self.quantized, self.solver.device),
            schemes=self.schemes,
            planned=self.solver.planned,
            online=self.solver.online,
            formats=self.plan.formats,
            recompute=self.plan.run is not None and self.plan.run.recompute,
        )
        if work.step.what.needs_training:
            self._training(view, work.step)
        return view

    def _run_float(self, step: Step, linear: Any = None) -> None:
        """Run the part on the float stream in the state before a step; its outputs serve the next part too."""
        stream = self.solver.float_stream
        assert stream is not None
        experts = [linears for mixture in self.mixtures for linears in mixture if linears]
        counts = RowCounts((linears[0] for linears in experts), linear) if experts else None
        on_value = linear.on_value if isinstance(linear, Observers) else None
        linear = counts or linear
        with torch.no_grad():
            tensors = cast(self.near, self.solver.compute)
            outputs = [
                stream.run(
                    i, step.program, self.part, tensors, step.bases, linear, self._keep_routes(i), on_value
                )
                for i in range(len(stream.batches))
            ]
        if self.outputs is None:
            self.outputs = outputs
            idle = [linears[0] for linears in experts if counts is not None and not counts.rows[linears[0]]]
            self.solver.journal.idle(self.part.name, [name.rpartition(".")[0] for name in idle], len(experts))

    def _keep_routes(self, index: int) -> Route:
        """Remember where the float model sends the rows of a microbatch: experts are trained on those."""

        def route(node: str, own: Tensor, experts: int) -> Tensor:
            return self.routes.setdefault((index, node), own.to(CPU)).to(own.device)

        return route

    def _routed(self, index: int) -> Route:
        """Rows of a microbatch go where the float model sent them."""
        return lambda node, own, experts: self.routes[index, node].to(own.device)

    def _training(self, view: BlockView, step: Step) -> None:
        """Give a view the block as a function of its linears, its training inputs, and its float outputs."""
        solver = self.solver
        if self.outputs is None and solver.float_stream is not None:
            self._run_float(step)
        stream = solver.quantized_stream if step.what.propagates_quantized else solver.float_stream
        assert stream is not None
        tensors = cast(self.near, solver.compute)
        for name in self.schemes_of(step):
            tensors[f"{name}.weight"] = self.near[f"{name}.weight"]

        def forward(hook: Any, index: int) -> Tensor:
            route = self._routed(index)
            values = stream.compute(index, step.program, self.part, tensors, step.bases, hook, route)
            return values[main_value(values, self.plan)]

        def walk() -> Walk:
            made = walk_over(stream, step.program, self.part, tensors, step.bases, self._routed)
            self.walked = made if stream is solver.quantized_stream else None
            return made

        view.walk = walk
        view.batches = len(stream.batches)
        view.forward = forward
        if (outputs := self.outputs) is not None:
            hidden = main_value(outputs[0], self.plan)
            view.target = lambda index: outputs[index][hidden].to(solver.device)
        view.report = lambda text: self._report(f"{step.what.name} {text}")

    def schemes_of(self, step: Step) -> list[str]:
        """The linears of this part that a step quantizes."""
        return [
            edit.site.module for work in self.work if work.step is step
            for rewrite in work.rewrites for edit in rewrite.edits if edit.verb is Verb.SWAP
        ]  # fmt: skip

    def _write(self) -> None:
        dtype = self.plan.dtype
        formats, ties = self.plan.formats, self.plan.final.ties
        row_parallel = roles_of(self.plan.program)["row_parallel"]
        for name, rows in self.rowwise.items():
            if name not in ties:
                self.solver.sink(name, rows.finished(self.plan.program, dtype))
        for module, q in self.quantized.items():
            for local, tensor in formats[module].pack(q, dtype, module in row_parallel).items():
                self.solver.sink(f"{module}.{local}", tensor)
        for name, tensor in self.state.stubs.items():
            if name in self.plan.layout.stubs:
                self.solver.sink(name, tensor)
        for name, tensor in self.tensors.items():
            if name in self.state.stubs:
                continue
            if name not in ties and name.rpartition(".")[0] not in self.quantized:
                self.solver.sink(name, self.solver.exported(name, tensor))

    def _advance(self) -> None:
        """Compute what the next part reads, and let the streams take it in."""
        solver, needed = self.solver, self.solver.needed[self.part.index]
        if self.part.index == 0 or not needed:
            return
        if solver.float_stream is not None:
            if self.outputs is None:
                self._run_float(replace(self.plan.steps[0], program=self.plan.program, bases=())
                                if not any(w.rewrites for w in self.work) else self._last_float_step())  # fmt: skip
            assert self.outputs is not None
            solver.float_stream.advance(self.outputs, needed)
        if solver.quantized_stream is not None:
            solver.quantized_stream.advance(self._quantized_outputs(solver.quantized_stream), needed)

    def _quantized_outputs(self, stream: Stream) -> list[Values]:
        """What the quantized part hands on: what a walk came to, where nothing was changed after it."""
        plan, indices = self.plan, range(len(stream.batches))
        walk, self.walked = self.walked, None  # it refers to this: a circle would outlive the part
        known = {} if walk is None or self.mixtures or self.state.stubs else walk.results
        if len(known) == len(indices):
            return [known[i] for i in indices]
        hook = quantized_linears(moved(self.quantized, stream.device), self.schemes, self.solver.compute)
        tensors = cast({**self.near, **moved(self.state.stubs, stream.device)}, self.solver.compute)
        with torch.no_grad():
            return [stream.run(i, plan.final, self.part, tensors, plan.bases, hook) for i in indices]

    def _last_float_step(self) -> Step:
        """The state after all passes, in which the float tensors are now: quantizers change no graph."""
        return replace(self.plan.steps[-1], program=self.plan.final, bases=self.plan.bases)
