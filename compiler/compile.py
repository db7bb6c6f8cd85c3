"""Compile: from a checkpoint to a quantized checkpoint, the whole way."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import registry
from .beside import write_beside
from .calibration import Calibration, calibration
from .capture import capture
from .certify import vocabulary
from .choose import check_asked, chosen
from .clock import Clock
from .contract import Pass
from .cost import Cost, cost_of
from .device import CPU, device_named, has_bfloat16, peak_on
from .errors import Failed, NotEquivalent, Refused
from .export import (
    RUN,
    Output,
    check_written,
    write_json,
)
from .fallback import attentions_to_leave, level
from .half_linear import has_half_units
from .journal import Journal
from .load import load_tokenizer
from .memory import Run
from .memory_limit import fitted, limits_of
from .named import named
from .plan import Plan, make_plan
from .program import Program
from .recipe import Recipe
from .reproducer import kept
from .resident import peak
from .safetensors_io import ShardWriter
from .scheme import Scheme
from .settle import settled
from .sink import sink_for
from .solve import Progress, Solver
from .source import ShapesOnly
from .targets.verdict import check_taken
from .twin_proof import prove_on_twin

TARGET = "vllm-ascend"
"""Who loads the result where nobody says."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """What a compile is told besides model, passes and output; the names are those of the command line."""

    scheme: str | Scheme | None = None
    """None is ``auto``, unless every quantizing pass has formats of its own."""
    target: Any = None
    """None is that of the recipe, else `TARGET`."""
    tp: int = 1
    calib: Sequence[str | Path] = ()
    """Empty is the recipe's ``dataset``, else the text that ships with qc."""
    samples: int = 32
    length: int = 512
    seed: int = 0
    device: str = "cpu"
    """Where blocks run, such as ``cuda:0``; weights and the values between blocks stay on the host."""
    dtype: str = "auto"
    """Dtype of calibration runs: ``auto`` is bfloat16 where checkpoint and device have it, else float32."""
    trust_remote_code: bool = False
    force: bool = False
    tokenizer: Any = field(default=None, compare=False)
    """Used instead of the checkpoint's own, for models in memory."""
    part_file_size: int = 4
    """Largest file of weights in GiB."""
    calibrate_all_experts: bool = False
    """Every expert sees every calibration token, instead of those that are routed to it."""
    fallback: str = "L0"
    """``Lk``: the k places whose rounding costs most on the calibration data stay float."""
    avg_bits: float | None = None
    """Choose the formats: those of least divergence within so many bits per weight."""
    max_kl: float | None = None
    """Choose the formats: those of fewest bits within so many nats per token."""
    choose_from: str | None = None
    """Formats to choose among; None is `menu.DEFAULT`."""
    timings: bool = False
    """Let the report tell of this run too: its seconds, its memory, its host."""
    max_memory: str | None = None
    """Most memory of the compile, such as ``cpu=8GiB,cuda:0=4GiB``: fewer tokens run at once where that is needed."""
    recipe: Path | None = None
    """The file that the passes were read from; the output depends on it."""

    def __post_init__(self) -> None:
        level(self.fallback)
        check_asked(self.avg_bits, self.max_kl, self.choose_from)
        if self.max_memory is not None:
            limits_of(self.max_memory, device_named(self.device))
        if self.chooses and (self.scheme is not None or level(self.fallback)):
            other = f"--fallback {self.fallback}" if self.scheme is None else "--scheme"
            raise Refused(f"{other}: the formats are chosen by --avg-bits or --max-kl; leave one of them out")
        if self.tp < 1:
            raise Refused(f"--tp {self.tp}: at least 1")
        if not 0 <= self.seed < 2**32:
            raise Refused(f"--seed {self.seed}: between 0 and {2**32 - 1}")
        if self.samples < 1 or self.length < 2:
            raise Refused(f"--samples {self.samples} --length {self.length}: at least 1 sample of 2 tokens")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise Refused(f"--dtype {self.dtype}: it is auto, {' or '.join(DTYPES)}")
        device_named(self.device)

    @property
    def chooses(self) -> bool:
        """Whether formats are chosen by measured error."""
        return self.avg_bits is not None or self.max_kl is not None


@dataclass(frozen=True)
class Result:
    """What a compile made."""

    path: Path
    plan: Plan
    journal: Journal
    calibration: Calibration | None = None
    """What it was calibrated on, if it was."""


Model = str | Path | nn.Module
Passes = str | Iterable[str | Pass] | Recipe
"""What is asked for: as on the command line, as a list, or read from a recipe."""


def plan(
    model: Model | Program, passes: Passes, options: Options | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Plan:  # fmt: skip
    """Everything that can be said before a weight is read. Its problems are listed, not raised.

    Where formats are chosen (``avg_bits``, ``max_kl``) the model runs for it, on the calibration data.
    """
    given = options or Options()
    options = filled(passes, given)
    program = (
        model if isinstance(model, Program) else capture(model, trust_remote_code=options.trust_remote_code)
    )

    def planned_in(scheme: str | Scheme | None) -> Plan:
        return make_plan(
            program, passes.passes if isinstance(passes, Recipe) else passes,
            scheme=scheme, target=options.target, tp=options.tp, seed=options.seed,
            calibrate_all_experts=options.calibrate_all_experts,
            run=Run(options.samples, options.length, compute_dtype(program, options), tuple(map(str, options.calib)),
                device=device_named(options.device),
            ),
        )  # fmt: skip

    planned = _chosen(program, planned_in, options, report) if options.chooses else planned_in(options.scheme)
    if options.max_memory is not None:
        planned = fitted(planned, limits_of(options.max_memory, device_named(options.device)))
    unserved = served_otherwise(planned) if isinstance(passes, Recipe) and given.target is None else ()
    return replace(
        planned, problems=(*planned.problems, *_unread(planned, options)),
        notes=(*origin(passes, given), *planned.notes, *unserved),
    )  # fmt: skip


def _unread(planned: Plan, options: Options) -> tuple[str, ...]:
    """Files of calibration text that a plan needs and that are not there."""
    missing = [file for file in options.calib if not Path(file).is_file()] if planned.needs_data else []
    return tuple(f"--calib {file}: no such file; give a text that exists" for file in missing)


def _chosen(
    program: Program,
    planned_in: Callable[[Scheme | None], Plan],
    options: Options,
    report: Callable[[Progress], None],
) -> Plan:
    """The plan in the formats that the budget buys."""
    if isinstance(program.source, ShapesOnly):
        program.source.load(())
    with _own_random_state():
        return chosen(
            planned_in, options.choose_from, calibration_of(program, options).tokens, avg_bits=options.avg_bits,
            max_kl=options.max_kl, compute=compute_dtype(program, options), report=report,
        )  # fmt: skip


def served_otherwise(planned: Plan) -> tuple[str, ...]:
    """What vllm-ascend would refuse of a plan whose recipe asks for the layout alone, with what it serves instead."""
    if planned.problems or planned.target.name == TARGET:
        return ()
    return tuple(
        f"vllm-ascend would not serve this: {one}"
        for one in registry.get("targets", TARGET).problems(planned)
    )


def filled(passes: Passes, options: Options) -> Options:
    """The options, with the recipe's word where nothing was given. Refused when its calibration text is not there."""
    if (plan := named(passes)) is not None:
        scheme = None if options.chooses else options.scheme or plan.scheme
        return replace(options, scheme=scheme, target=options.target or plan.target)
    if not isinstance(passes, Recipe):
        return replace(options, target=options.target or TARGET)
    return replace(
        options,
        target=options.target or passes.target or TARGET,
        calib=tuple(options.calib) or passes.calibration(),
        part_file_size=passes.part_file_size or options.part_file_size,
        recipe=passes.path,
    )


def origin(passes: Passes, options: Options) -> tuple[str, ...]:
    """What a plan takes from a recipe and what it does not, and the recipe's own remarks."""
    if not isinstance(passes, Recipe):
        return ()
    taken, left = ["passes"], list[str]()
    for what, own, given in (
        ("target", passes.target, options.target),
        ("dataset", passes.dataset, options.calib),
    ):
        if own is not None:
            (left if given else taken).append(f"{what} {own}")
    notes = (f"from {passes.path.name}: {', '.join(taken)}", *passes.notes)
    return (*notes, f"not taken from {passes.path.name}: {', '.join(left)}") if left else notes


def compile(
    model: Model | Program,
    passes: Passes,
    out: str | Path,
    options: Options | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Compile a model into the directory ``out``, which is there whole or not at all.

    Raises:
        Refused: The input or the plan is not acceptable; nothing was done.
        Failed: Something broke on the way, a failed proof above all; nothing is left at ``out``.
    """
    given = options or Options()
    options = filled(passes, given)
    report = clock = Clock(report)
    read = [Path(file) for file in (*options.calib, options.recipe) if file is not None]
    output = Output(out, force=options.force, inputs=read + _paths(model))
    output.check()
    planned = plan(model, passes, given, report).require()
    if isinstance(planned.program.source, ShapesOnly):
        planned.program.source.load(())
    data = _data(planned, options)
    if data is not None:
        scheme = planned.scheme if options.chooses else options.scheme
        again = replace(options, fallback="L0", avg_bits=None, max_kl=None, choose_from=None, scheme=scheme)
        with _own_random_state():
            planned = settled(
                planned, options.fallback, data.tokens, compute_dtype(planned.program, options),
                lambda passes: plan(planned.program, passes, again).require(), report,
            )  # fmt: skip
    estimate = cost_of(planned)
    proved_first = prove_on_twin(planned)
    layout = planned.layout
    output.check(layout.nbytes)
    try:
        journal = _work(planned, data, proved_first, output, options, clock, estimate)
    except NotEquivalent as error:
        raise kept(error, planned, output.out) from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise Failed(f"{output.out}: {error.strerror or error}{where}; nothing is left there") from error
    return Result(Path(out), planned, journal, data)


def _work(
    planned: Plan, data: Calibration | None, proved: Any, output: Output, options: Options,
    clock: Clock, estimate: Cost,
) -> Journal:  # fmt: skip
    """Solve the plan and write the whole output; ``estimate`` holds what peak memory was thought to be."""
    layout = planned.layout
    with output, _own_random_state():
        stem = planned.target.stem(layout)
        with ShardWriter(output.path, layout.specs, stem, options.part_file_size) as writer:
            solver = Solver(
                planned, data.tokens if data else _random_ids(planned.program, options),
                sink_for(planned, layout, writer), compute=compute_dtype(planned.program, options), report=clock,
            )  # fmt: skip
            solver.journal.twin(proved)
            journal = solver.run()
        check_written(output.path, layout.specs)
        planned.target.finish(output.path, layout)
        run = {
            "seconds": round(clock.stop(), 2),
            "stages": {stage: round(spent, 2) for stage, spent in clock.stages.items()},
            "peak_memory_bytes": peak(), "estimated_peak_memory_bytes": estimate.peak_bytes,
            **_accelerator(planned, estimate),
            "host": platform.node(), "threads": torch.get_num_threads(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "removed": list(output.removed),
        }  # fmt: skip
        write_beside(planned, layout, data, journal, output.path, options, run if options.timings else None)
        check_taken(planned.target, output.path, planned.tp, options.trust_remote_code)
        write_json(output.path / RUN, run)
    return journal


def _accelerator(planned: Plan, estimate: Cost) -> dict[str, Any]:
    """The device that blocks ran on besides the host, and its memory."""
    if estimate.accelerator is None:
        return {}
    device, thought = estimate.accelerator
    return {
        "device": device, "device_peak_memory_bytes": peak_on(planned.device),
        "estimated_device_peak_memory_bytes": thought,
    }  # fmt: skip


def _paths(model: Model | Program) -> list[Path]:
    path = model.path if isinstance(model, Program) else model
    return [Path(path)] if isinstance(path, str | Path) and Path(path).is_dir() else []


def compute_dtype(program: Program, options: Options) -> torch.dtype:
    """The dtype of calibration runs."""
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    own = {program.source.dtype(name) for name in program.source.names()}
    device = device_named(options.device)
    fast = has_half_units() if device == CPU else has_bfloat16(device)
    return torch.bfloat16 if torch.bfloat16 in own and fast else torch.float32


def _data(planned: Plan, options: Options) -> Calibration | None:
    """Calibration tokens, where the plan needs them."""
    if not (planned.needs_data or level(options.fallback) or attentions_to_leave(planned)):
        return None
    return calibration_of(planned.program, options)


def calibration_of(program: Program, options: Options) -> Calibration:
    """Calibration tokens for a model. Refused where there is no tokenizer, or one of another model."""
    tokenizer = options.tokenizer
    if tokenizer is None:
        if program.path is None:
            raise Refused(
                "the model in memory has no tokenizer, and the plan needs calibration data: give tokenizer="
            )
        tokenizer = load_tokenizer(program.path)
    data = calibration(options.calib, tokenizer, samples=options.samples, length=options.length)
    rows, highest = vocabulary(program), int(data.tokens.max())
    if highest >= rows:
        raise Refused(
            f"the tokenizer gives token {highest}, and the model's embedding has {rows} rows: the tokenizer"
            " belongs to another model, or the embedding was cut"
        )
    return data


def _random_ids(program: Program, options: Options) -> Tensor:
    """Token ids for the proofs of a plan that needs no calibration data, [1, 64]."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randint(0, vocabulary(program), (1, 64), generator=generator)


@contextmanager
def _own_random_state() -> Any:
    """Leave the caller's global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        yield
