"""The Python interface: the same engine as the command line, with the options as keywords."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .compiler import compile as engine
from .compiler.analyze import Analysis
from .compiler.analyze import analyze as _analyze
from .compiler.bisect import Bisection
from .compiler.bisect import bisect as _bisect
from .compiler.calib_mix import Mix
from .compiler.calib_mix import mix as _mix
from .compiler.calib_readers.question import Answers, Reader
from .compiler.calib_refine import Refinement
from .compiler.calib_refine import refine as _refine
from .compiler.capture import capture
from .compiler.contract import Pass
from .compiler.errors import Refused
from .compiler.evaluate import evaluate
from .compiler.generate import generate
from .compiler.load import load
from .compiler.plan import Plan
from .compiler.program import Program
from .compiler.program_file import load_program
from .compiler.recipe import read_recipe
from .compiler.scheme import Scheme
from .compiler.show.text import text as show
from .compiler.solve import Progress
from .compiler.targets.verdict import verdict
from .compiler.verify import verify
from .runtime.phase import set_phase

__all__ = [
    "analyze", "bisect", "calib_mix", "calib_refine", "capture", "compile", "evaluate", "generate", "load",
    "load_program", "plan", "set_phase", "show", "verdict", "verify",
]  # fmt: skip


def plan(
    model: engine.Model | Program, passes: str | Iterable[str | Pass] | None = None, *,
    config: str | Path | None = None, scheme: str | Scheme | None = None, target: Any = None,
    tp: int = 1, seed: int = 0, trust_remote_code: bool = False,
) -> Plan:  # fmt: skip
    """What a compile would do, before any weight is read. ``print(plan)`` shows it; ``plan.problems`` lists why not.

    Args:
        model: A checkpoint directory, a hub id, an ``nn.Module`` in memory, or what ``capture`` returned.
        passes: As on the command line (``"iter_smooth{alpha=0.7},quarot"``), or a list of names and passes.
        config: In place of ``passes``, a recipe: a YAML file of ``apiversion: modelslim_v1``.
        scheme: The rule list of every quantizing pass that has none of its own: a name, or a ``Scheme``. None is
            ``auto``.
        target: Who loads the result: a name, or a target. None is the recipe's, else ``vllm-ascend``.
        tp: Tensor-parallel ranks of the server.
        seed: Of everything random.
        trust_remote_code: Whether Python code that comes with the checkpoint may run.
    """
    options = engine.Options(
        scheme=scheme, target=target, tp=tp, seed=seed, trust_remote_code=trust_remote_code
    )
    return engine.plan(model, _asked(passes, config), options)


def compile(
    model: engine.Model | Program, passes: str | Iterable[str | Pass] | None = None, *, out: str | Path,
    config: str | Path | None = None, scheme: str | Scheme | None = None, target: Any = None, tp: int = 1,
    calib: Sequence[str | Path] = (), samples: int = 32, length: int = 512, seed: int = 0,
    device: str = "cpu", dtype: str = "auto", force: bool = False, trust_remote_code: bool = False,
    tokenizer: Any = None, calibrate_all_experts: bool = False,
    avg_bits: float | None = None, max_kl: float | None = None, choose_from: str | None = None,
    max_memory: str | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> engine.Result:  # fmt: skip
    """Compile a model into the directory ``out``, which is there whole or not at all.

    Args:
        model: As for ``plan``.
        passes: As for ``plan``.
        out: Directory to make.
        config: As for ``plan``; what is given here goes before what it says.
        scheme: As for ``plan``.
        target: As for ``plan``.
        tp: As for ``plan``.
        calib: Files of calibration text (.jsonl, .json, .txt); none takes the recipe's ``dataset``, else a
            small text that ships with qc.
        samples: Calibration windows.
        length: Tokens per window.
        seed: Of everything random.
        device: Where blocks run, such as ``"cuda:0"``; weights and the values between blocks stay on the host.
        dtype: Dtype of calibration runs: ``auto`` (the checkpoint's), ``bfloat16``, ``float32``.
        force: Replace ``out`` when it exists.
        trust_remote_code: Whether Python code that comes with the checkpoint may run.
        tokenizer: In place of the checkpoint's own; needed for models in memory.
        calibrate_all_experts: Let every expert of a mixture see every calibration token, instead of those that
            are routed to it.
        avg_bits: Instead of a scheme: the formats of least divergence within so many bits per weight. How they were
            chosen is ``result.plan.choice``.
        max_kl: Instead of a scheme: the formats of fewest bits within so many nats per token.
        choose_from: Formats to choose among, such as ``"w4a4,w8a8,float"``.
        max_memory: Most memory, such as ``"cpu=8GiB"`` or ``"cpu=8GiB,cuda:0=4GiB"``.
        report: Called with the progress.

    Raises:
        Refused: The input or the plan is not acceptable; nothing was done.
        Failed: Something broke on the way, such as a failed proof; nothing is left at ``out``.
    """
    options = engine.Options(
        scheme=scheme, target=target, tp=tp, calib=calib, samples=samples, length=length, seed=seed,
        device=device, dtype=dtype, force=force, trust_remote_code=trust_remote_code, tokenizer=tokenizer,
        calibrate_all_experts=calibrate_all_experts,
        avg_bits=avg_bits, max_kl=max_kl, choose_from=choose_from, max_memory=max_memory,
    )  # fmt: skip
    return engine.compile(model, _asked(passes, config), out, options, report)


def analyze(
    model: engine.Model | Program, *, metric: str | None = None, by: str = "linear", scheme: str | Scheme = "w8a8",
    top: int = 15, calib: Sequence[str | Path] = (), samples: int = 32, length: int = 512, dtype: str = "auto",
    tokenizer: Any = None, trust_remote_code: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Analysis:  # fmt: skip
    """Which linears, layers or attentions of a float model are most sensitive to quantization, the worst first.

    Args:
        model: As for ``plan``.
        metric: ``kurtosis``, ``std``, ``quantile``, ``mse`` or ``kl``; None is ``kurtosis``, and ``mse`` of attentions.
        by: ``linear``, ``layer`` or ``attention``.
        scheme: Formats that ``mse`` and ``kl`` round to.
        top: How many of the worst ``exclude`` of the result names.
        calib: As for ``compile``.
        samples: Calibration windows.
        length: Tokens per window.
        dtype: As for ``compile``.
        tokenizer: As for ``compile``.
        trust_remote_code: As for ``plan``.
        report: Called with the progress.

    Raises:
        Refused: The input is not acceptable, or there is no such metric.
    """
    options = engine.Options(
        calib=calib, samples=samples, length=length, dtype=dtype, tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return _analyze(model, options, metric=metric, by=by, scheme=scheme, top=top, report=report)


def bisect(
    model: engine.Model | Program, passes: str | Iterable[str | Pass] | None = None, *,
    config: str | Path | None = None, max_kl: float | None = None, scheme: str | Scheme | None = None,
    target: Any = None, tp: int = 1, calib: Sequence[str | Path] = (), samples: int = 32, length: int = 512,
    seed: int = 0, dtype: str = "auto", tokenizer: Any = None, trust_remote_code: bool = False,
    calibrate_all_experts: bool = False, report: Callable[[Progress], None] = lambda progress: None,
) -> Bisection:  # fmt: skip
    """Which step of a plan hurts what the model says, and at which of its places; a number for every step.

    Args:
        model: As for ``plan``.
        passes: As for ``plan``.
        config: As for ``plan``.
        max_kl: Name the first step past so many nats per token of divergence; None names the one that adds most.
        scheme: As for ``plan``.
        target: As for ``plan``.
        tp: As for ``plan``.
        calib: As for ``compile``; divergences are measured on its first 1024 tokens.
        samples: As for ``compile``.
        length: As for ``compile``.
        seed: As for ``compile``.
        dtype: As for ``compile``.
        tokenizer: As for ``compile``.
        trust_remote_code: As for ``plan``.
        calibrate_all_experts: As for ``compile``.
        report: Called with the progress.

    Raises:
        Refused: The input or the plan is not acceptable.
        Failed: A pass broke, such as by a failed proof.
    """
    options = engine.Options(
        scheme=scheme, target=target, tp=tp, calib=calib, samples=samples, length=length, seed=seed, dtype=dtype,
        tokenizer=tokenizer, trust_remote_code=trust_remote_code, calibrate_all_experts=calibrate_all_experts,
    )  # fmt: skip
    return _bisect(model, _asked(passes, config), options, max_kl=max_kl, report=report)


def calib_mix(
    sets: str | Path | Mapping[str, str | Path], sizes: Mapping[str, int], *, out: str | Path,
    positive: str | Path | Answers | None = None, seed: int = 0, readers: Mapping[str, Reader] | None = None,
    force: bool = False,
) -> Mix:  # fmt: skip
    """Draw questions from data sets, balanced over subjects and answers, and write them as calibration text.

    Args:
        sets: A config file as for ``qc calib mix``, or paths by the names of sets.
        sizes: How many questions of each set.
        out: The ``.jsonl`` or ``.json`` to write.
        positive: A checkpoint, or anything that answers; only questions that it answers right are taken.
        seed: Of the drawing.
        readers: Readers of sets that no installed package registers, by the name of the set.
        force: Replace ``out`` when it exists.

    Raises:
        Refused: A config or a set is not what it should be, or has too few questions.
    """
    return _mix(sets, sizes, out, positive=positive, seed=seed, readers=readers, force=force)


def calib_refine(
    model: engine.Model | Program, passes: str | Iterable[str | Pass] | None = None, *, out: str | Path,
    calib: Sequence[str | Path], config: str | Path | None = None, scheme: str | Scheme | None = None,
    target: Any = None, tp: int = 1, add: Sequence[str | Path] = (), judge: Sequence[str | Path] = (),
    worth: float = 1.0, most: float = 0.25, samples: int = 64, length: int = 512, seed: int = 0,
    dtype: str = "auto", force: bool = False, tokenizer: Any = None, trust_remote_code: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Refinement:  # fmt: skip
    """Leave out the samples of a calibration set that raise the error of the quantized blocks; add bad cases.

    Args:
        model: As for ``plan``.
        passes: As for ``plan``: what the set is to calibrate.
        out: The ``.jsonl`` or ``.json`` to write.
        calib: Files of the set, a sample per line.
        config: As for ``plan``.
        scheme: As for ``plan``.
        target: As for ``plan``.
        tp: As for ``plan``.
        add: Files of bad cases.
        judge: Text on which errors are measured; none takes samples of the set in turn.
        worth: Per cent of the error that a sample has to cost to be dropped.
        most: Largest share of the samples that is dropped.
        samples: Samples that are looked at, from the first.
        length: Tokens of each that are looked at.
        seed: Of everything random.
        dtype: As for ``compile``.
        force: Replace ``out`` when it exists.
        tokenizer: As for ``compile``.
        trust_remote_code: As for ``plan``.
        report: Called with the progress.

    Raises:
        Refused: The input is not acceptable, or nothing depends on calibration data.
    """
    options = engine.Options(
        scheme=scheme, target=target, tp=tp, calib=calib, samples=samples, length=length, seed=seed, dtype=dtype,
        force=force, tokenizer=tokenizer, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return _refine(
        model,
        _asked(passes, config),
        out,
        options,
        add=add,
        judge=judge,
        worth=worth,
        most=most,
        report=report,
    )


def _asked(passes: str | Iterable[str | Pass] | None, config: str | Path | None) -> engine.Passes:
    """The passes, or the recipe in their place."""
    if (passes is None) == (config is None):
        what = (
            "passes and config are both given: give one of them"
            if config is not None
            else "no passes: give passes= or config="
        )
        raise Refused(what)
    return read_recipe(config) if config is not None else passes or ""
