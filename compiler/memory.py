"""Peak memory of a compile, on the host and where blocks run, estimated from shapes before any weight is read.

The process at the end of the plan is measured (VmRSS: imports, captured graph); what comes on top is added up.
B is the parameters of a part, L its largest linear, T all calibration tokens, t those of a microbatch, H and W the
width of the residual stream and of the widest linear, c the bytes of the dtype of calibration runs.

========== =====================================================================================================
process    VmRSS at plan time; tokenizer (12 bytes per byte of its file) and text; kernels that run for the first time
streams    c·T·H of boundary values: in float where a pass asks for it, quantized where later blocks see that
load       B as stored and as float32
prove      float32 weights; one linear edited in float64, 12·L and 20 per weight of a piece; 128 proof tokens in float64
apply      float32 weights, those that one rewrite changes twice, and one linear edited
observe    float32 weights, their cast to c, the outputs c·T·H, activations c·t·(4·W + 8·H)
solve      the same, without the activations, and what the pass says of itself (``Pass.working_bytes``)
advance    float32 weights, their cast, integers and the weights they stand for, outputs of both streams
tables     embedding and head as stored, and once more cast for the prologue or finished for the export
========== =====================================================================================================

The largest of the phases of the largest part counts, times a factor for what the allocator leaves unused. On a device
of its own a block has its float32 weights once more, their cast, activations and what a pass says of itself; the host
keeps the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch

from .contract import EXACT, BlockSize, LinearSize
from .device import CPU
from .edit import Edit, Verb
from .execute import parameters_of
from .operand import Quantize
from .pieces import PIECE
from .plan import Plan
from .program import Part
from .resident import peak, resident
from .rows import is_rowwise
from .solve import MICROBATCH
from .statistics import ROWS

KERNELS = 35 * 2**20
"""What the first run of linears, proofs and writing costs a process once."""
TOKENIZER = 12
"""Bytes of a loaded tokenizer per byte of its file."""
TEXT = 40
"""Bytes per byte of calibration text while it is tokenized."""
UNUSED = 1.2
"""Share of freed memory between blocks in use that the allocator can not give to others."""
EDITED, CUT = 12, 20
"""Bytes per weight of a linear that is edited in float64 (itself, its float32), and of a piece (products, copies)."""
PROOF_TOKENS = 128
FLOAT32, FLOAT64 = 4, 8
CONTEXT = 2**29
"""What the driver's context and kernels take of an accelerator, about."""
WITHOUT_DATA = ("load", "prove", "apply", "round")
"""Phases of a block in which no calibration token runs; in the others the block's outputs are held too."""


def edit_bytes(count: int) -> int:
    """What editing a linear of so many weights takes, on top of its float32."""
    return EDITED * count + CUT * min(count, PIECE)


@dataclass(frozen=True)
class Run:
    """How a compile runs its calibration: what the plan has to know of it to cost it."""

    samples: int
    length: int
    compute: torch.dtype
    """Dtype of calibration runs."""
    calib: tuple[str, ...] = ()
    """Files of calibration text."""
    tokens: int = MICROBATCH
    """Most tokens that run at once; a sequence is never cut."""
    device: torch.device = CPU
    """Where blocks run."""
    recompute: bool = False
    """Whether trainings make weights on their grids again in the backward pass, instead of keeping how they came."""

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return self.compute.itemsize

    @property
    def microbatch(self) -> int:
        """Tokens that run at once: whole sequences, one at least."""
        return min(self.samples, max(1, self.tokens // self.length)) * self.length

    def __str__(self) -> str:
        return f"{self.samples} x {self.length} tokens in {str(self.compute).removeprefix('torch.')}"


@dataclass(frozen=True)
class Phase:
    """What a phase of a block holds: weights and the values between blocks, and what runs."""

    host: int
    run: int = 0


def peak_of(plan: Plan, run: Run, process: int | None = None) -> int:
    """Estimated peak resident memory in bytes; ``process`` is what is resident now (measured by default)."""
    sizes = _Sizes(plan, run)
    held = sizes.survey() + max(sizes.part(part) for part in plan.program.parts)
    now = resident() if process is None else process
    estimate = now + KERNELS + int(UNUSED * held) + (_text(plan, run) if plan.needs_data else 0)
    return estimate if process is not None else max(estimate, peak())


def device_peak_of(plan: Plan, run: Run) -> int:
    """Estimated peak memory in bytes of the device that blocks run on; 0 where that is the host."""
    if run.device == CPU or not plan.needs_data:
        return 0
    sizes = _Sizes(plan, run)
    return CONTEXT + int(UNUSED * max(sizes.near(part, phase) for part, phase, _ in sizes.running()))


def phases_of(plan: Plan, run: Run, part: Part) -> dict[str, int]:
    """Bytes that each phase of a block holds, all in one place."""
    return {name: phase.host + phase.run for name, phase in _Sizes(plan, run).phases(part).items()}


def largest_there(plan: Plan, run: Run) -> tuple[str, int]:
    """What takes most of the peak of the device, in words, and its bytes."""
    sizes = _Sizes(plan, run)
    part, name, most = max(
        ((part.name, name, sizes.near(part, phase)) for part, phase, name in sizes.running()),
        key=lambda one: one[2],
    )
    return f"{part}, to {name}", most


def largest_of(plan: Plan, run: Run) -> tuple[str, int]:
    """What takes most of the peak of the host, in words, and its bytes."""
    sizes = _Sizes(plan, run)
    found = {"the process before any weight is read": resident() + KERNELS}
    if plan.needs_data:
        found["the values between blocks, of all calibration tokens"] = sizes.streams() + sizes.stream()
        found["what passes keep of the whole model before they solve"] = sizes.survey()
    for part in plan.program.parts:
        if part.kind < 0:
            found[part.name] = sizes.ends(part)
        else:
            for name, phase in sizes.phases(part).items():
                outputs = 0 if name in WITHOUT_DATA else sizes.stream()
                found[f"{part.name}, to {name}"] = sizes.here(phase) - outputs
    name = max(found, key=lambda one: found[one])
    return name, found[name]


def _text(plan: Plan, run: Run) -> int:
    tokenizer = Path(plan.program.path or "", "tokenizer.json")
    return TOKENIZER * _size(tokenizer) + TEXT * sum(_size(Path(file)) for file in run.calib)


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


class _Sizes:
    """Bytes of each part of one plan."""

    def __init__(self, plan: Plan, run: Run) -> None:
        self.plan, self.run, self.program = plan, run, plan.program
        self.tokens = run.samples * run.length

    @cached_property
    def place(self) -> dict[str, int]:
        """Module to the index of its part."""
        return {str(n.target): n.meta["part"] for n in self.program.graph.nodes if n.op == "call_module"}

    @cached_property
    def edits(self) -> dict[str, list[Edit]]:
        """Module to all edits of it."""
        found: dict[str, list[Edit]] = {}
        for step in self.plan.steps:
            for rewrite in step.answer.rewrites:
                for edit in rewrite.edits:
                    found.setdefault(edit.site.module, []).append(edit)
        return found

    @cached_property
    def touched(self) -> dict[int, int]:
        """Part to the weights that one EXACT rewrite changes there, at most."""
        found: dict[int, int] = {}
        for step in self.plan.steps:
            for rewrite in step.answer.rewrites:
                if rewrite.claim is not EXACT:
                    continue
                here: dict[int, int] = {}
                for module in rewrite.modules:
                    index = self.place[module]
                    here[index] = here.get(index, 0) + self.count(module)
                for index, count in here.items():
                    found[index] = max(found.get(index, 0), count)
        return found

    @cached_property
    def hidden(self) -> int:
        """Width of the residual stream: of what the last block hands on."""
        last = self.program.blocks[-1].index
        widths = [
            source.meta["val"].shape[-1]
            for node in self.program.nodes(self.program.parts[-1])
            for source in node.all_input_nodes
            if source.meta["part"] == last and isinstance(source.meta.get("val"), torch.Tensor)
        ]
        return max((int(width) for width in widths), default=0)

    def count(self, module: str) -> int:
        return sum(prod(shape) for shape in self.program.leaves[module].parameters.values())

    def stream(self) -> int:
        """Boundary values of all microbatches."""
        return self.run.itemsize * self.tokens * self.hidden

    def streams(self) -> int:
        """What is kept between parts."""
        if not self.plan.needs_data:
            return 0
        return self.stream() * (self.plan.runs_float + self.quantizes_inputs)

    @property
    def quantizes_inputs(self) -> bool:
        return any(step.what.propagates_quantized for step in self.plan.steps)

    def survey(self) -> int:
        """Rows that passes keep of the whole model before anything is solved, with the copies that they turn."""
        rows = 0
        for step in self.plan.steps:
            for rewrite in step.answer.rewrites:
                for need in step.what.surveys(rewrite):
                    size = int(need.kind.partition(":")[2] or ROWS)
                    leaf = self.program.leaves[need.module]
                    rows += min(size, self.tokens) * leaf.parameters["weight"][0 if leaf.transposed else 1]
        return 3 * FLOAT32 * rows

    def part(self, part: Part) -> int:
        """Bytes on top of the process while a part is solved, at most."""
        return self.streams() + (self.block(part) if part.kind >= 0 else self.ends(part))

    def ends(self, part: Part) -> int:
        """Prologue or epilogue: tables as they are stored and one copy; the rest as float32."""
        source, export, total, largest = self.program.source, self.plan.dtype, 0, 0
        for name in parameters_of(self.program, part):
            count, stored = prod(source.shape(name)), source.dtype(name).itemsize
            module, _, _ = name.rpartition(".")
            leaf, edits = self.program.leaves.get(module), self.edits.get(module, [])
            meta = torch.empty(source.shape(name), device="meta")
            if leaf is None or not is_rowwise(leaf, name, meta, edits):
                total += (stored + FLOAT32) * count
                largest = max(largest, edit_bytes(count) if edits else 0)
                continue
            finished = export.itemsize if edits or source.dtype(name) != export else 0
            runs = part.index == 0 and self.plan.needs_data and source.dtype(name) != self.run.compute
            total += stored * count
            largest = max(largest, count * max(finished, self.run.itemsize if runs else 0))
        return total + largest

    def block(self, part: Part) -> int:
        """The largest phase of a block on the host."""
        return max(self.here(phase) for phase in self.phases(part).values())

    def here(self, phase: Phase) -> int:
        """What a phase holds on the host."""
        return phase.host + (phase.run if self.run.device == CPU else 0)

    def near(self, part: Part, phase: Phase) -> int:
        """What a phase holds on the device: the weights once more, and what runs."""
        return self.weights(part) + phase.run

    def running(self) -> Iterator[tuple[Part, Phase, str]]:
        """The phases in which blocks run, with their names."""
        for part in self.program.blocks:
            for name, phase in self.phases(part).items():
                if phase.run:
                    yield part, phase, name

    def weights(self, part: Part) -> int:
        """Of a part, as float32."""
        names = parameters_of(self.program, part)
        return FLOAT32 * sum(prod(self.program.source.shape(name)) for name in names)

    def phases(self, part: Part) -> dict[str, Phase]:
        """What each phase of a block holds, by what it does."""
        run, names = self.run, parameters_of(self.program, part)
        source = self.program.source
        weights = {name: prod(source.shape(name)) for name in names}
        held = FLOAT32 * sum(weights.values())
        stored = sum(source.dtype(name).itemsize * count for name, count in weights.items())
        cast = 0 if run.itemsize == FLOAT32 else run.itemsize * sum(weights.values())
        linears = self.linears(part)
        size = BlockSize(linears, run.microbatch, run.itemsize, self.hidden, self.tokens, run.recompute)
        edited = [
            self.count(s.name)
            for s in linears
            if any(e.verb is not Verb.SWAP for e in self.edits.get(s.name, ()))
        ]
        working = edit_bytes(max(edited, default=0))
        quantized = sum(s.out * s.width for s in linears if s.scheme is not None)
        phases = {
            "load": Phase(stored + held),
            "prove": Phase(held + working + PROOF_TOKENS * FLOAT64 * size.activations),
            "apply": Phase(held + FLOAT32 * self.touched.get(part.index, 0) + working),
            "round": Phase(
                held + quantized + 2 * FLOAT64 * max((s.out * s.width for s in linears), default=0)
            ),
        }
        if self.plan.needs_data:
            kept = held + self.stream()
            activations = run.itemsize * self.run.microbatch * size.activations
            phases["observe"] = Phase(kept, cast + activations)
            phases |= {
                f"solve {step.what.name}": Phase(kept, cast + step.what.working_bytes(size))
                for step in self.plan.steps
            }
            if self.quantizes_inputs:
                phases["advance"] = Phase(
                    kept + self.stream(), cast + activations + quantized * (1 + run.itemsize)
                )
        return phases

    def linears(self, part: Part) -> tuple[LinearSize, ...]:
        """The linears of a block in graph order, with the scheme that each gets."""
        found = []
        for node in self.program.nodes(part):
            leaf = self.program.leaf(node)
            if leaf is None or leaf.kind != "linear":
                continue
            out, width = leaf.parameters["weight"][:: -1 if leaf.transposed else 1]
            operands: Iterable[object] = (edit.operand for edit in self.edits.get(str(node.target), ()))
            scheme = next((operand.scheme for operand in operands if isinstance(operand, Quantize)), None)
            found.append(LinearSize(str(node.target), out, width, scheme))
        return tuple(found)
