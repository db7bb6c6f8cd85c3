"""Sensitivity: which linears, layers or attentions would suffer most from being quantized, found in one sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ..runtime.quantized import QuantizedLinear
from .attention_noise import AttentionNoise
from .attention_sites import attention_sites
from .capture import capture
from .chart import bars
from .compile import Model, Options, calibration_of, compute_dtype
from .divergences import divergences
from .errors import Refused
from .fake_quant import fake_act, quantized_linears
from .nearest import Nearest
from .noise_sweep import error_of
from .observe import Observers
from .operand import Statistic
from .program import Part, Program
from .roles import mixtures, peers, read_together, routers
from .scheme import FLOAT, LinearScheme, Scheme, matches
from .scheme_names import scheme_named
from .solve import MICROBATCH, Progress
from .spread import kurtosis
from .survey import FloatBlock, float_blocks
from .view import LinearHook

METRICS = ("kurtosis", "std", "quantile", "mse", "kl")
KINDS = ("linear", "layer", "attention")
SHOWN, BAR = 15, 30
"""Rows of the table at least, and the length of the longest bar."""


@dataclass(frozen=True)
class Score:
    """How sensitive one thing is; more is worse."""

    name: str
    value: float


@dataclass(frozen=True)
class Analysis:
    """What an analysis found."""

    metric: str
    by: str
    scheme: str | None
    """Formats that were rounded to; None where none were."""
    scores: tuple[Score, ...]
    """The worst first."""
    exclude: tuple[str, ...]
    """Globs of the worst, to paste into a recipe or after ``exclude=``."""


def analyze(
    model: Model | Program, options: Options | None = None, *, metric: str | None = None, by: str = "linear",
    scheme: str | Scheme = "w8a8", top: int = 15,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Analysis:  # fmt: skip
    """Which parts of a model are most sensitive to quantization: see ``sensitivity``.

    Args:
        model: As for a compile.
        options: Calibration text, windows, dtype and tokenizer; the rest is not read.
        metric: None is ``kurtosis``, and ``mse`` of attentions.
        by: ``linear``, ``layer`` or ``attention``.
        scheme: Formats for ``mse`` and ``kl``.
        top: How many of the worst the list to exclude holds; ties with the last come too.
        report: Told of the progress.

    Raises:
        Refused: The input is not acceptable, or there is nothing of the kind in the model.
    """
    options = options or Options()
    metric = metric or ("mse" if by == "attention" else "kurtosis")
    if top < 1:
        raise Refused(f"--top {top}: at least 1")
    formats = scheme_named(scheme) if isinstance(scheme, str) else scheme
    check_asked(metric, by, formats)
    program = (
        model if isinstance(model, Program) else capture(model, trust_remote_code=options.trust_remote_code)
    )
    data, compute = calibration_of(program, options), compute_dtype(program, options)
    if metric == "kl":
        scores = ranked(
            divergences(program, data.tokens, formats, compute, by_layer=by == "layer", report=report)
        )
    else:
        scores = sensitivity(
            program, data.tokens, metric=metric, by=by, scheme=formats, compute=compute, report=report
        )
    if not scores:
        raise Refused(f"--by {by}: the model has no {by} that could be looked at")
    rounded = formats.name if metric in ("mse", "kl") and by != "attention" else None
    return Analysis(metric, by, rounded, scores, tuple(to_exclude(program, scores, by, top)))


def check_asked(metric: str, by: str, scheme: Scheme) -> None:
    """Refused for a combination that there is not."""
    if metric not in METRICS or by not in KINDS:
        raise Refused(f"--metric {metric} --by {by}: metrics are {', '.join(METRICS)}; by {', '.join(KINDS)}")
    if by == "attention" and metric != "mse":
        raise Refused(f"--by attention --metric {metric}: attentions are compared by mse")
    if metric in ("mse", "kl") and by != "attention" and not scheme.rules:
        raise Refused(f"--metric {metric} --scheme {scheme.name}: give formats to round to, such as w8a8")


def ranked(found: Mapping[str, float]) -> tuple[Score, ...]:
    """The worst first; ties by name."""
    return tuple(
        sorted((Score(name, value) for name, value in found.items()), key=lambda s: (-s.value, s.name))
    )


@torch.no_grad()
def sensitivity(
    program: Program, ids: Tensor, *, metric: str, by: str, scheme: Scheme,
    compute: torch.dtype = torch.float32, report: Callable[[Progress], None] = lambda progress: None,
) -> tuple[Score, ...]:  # fmt: skip
    """Scores of all linears of the blocks, of the blocks, or of the attentions, the worst first.

    Args:
        program: The float model; it runs once over the tokens, block by block.
        ids: Calibration tokens [n, length].
        metric: Of the inputs of a linear ``kurtosis`` (excess, of all values), ``std`` (largest value over the largest
            deviation of a channel) or ``quantile`` (the step of an int8 grid over the distance of the quartiles); or
            ``mse``, the relative error of an output once rounded to nearest: of the linear, of the block with all its
            linears, or of the attention with q, k and v in int8.
        by: ``linear``, ``layer`` (the worst of its linears, or its own output for ``mse``) or ``attention``.
        scheme: Formats for ``mse`` of linears and layers.
        compute: Dtype of the run.
        report: Told of the progress.

    Source: spec/modelslim.md 7.1. All values of a sample of rows count, where the reference tool takes one value in a
    hundred: that misses channels whose number has a factor in common with a hundred.
    """
    found: dict[str, float] = {}
    left = routers(program)
    nearest = Nearest(program, scheme) if metric == "mse" and by != "attention" else None
    attentions = {site.node: site.module for site in attention_sites(program)} if by == "attention" else {}
    noise = AttentionNoise({node: dict.fromkeys(range(3), "head") for node in attentions})
    observers: dict[str, Observers] = {}

    def watch(part: Part) -> tuple[LinearHook | None, Any]:
        report(Progress(part.name, part.index, len(program.parts), f"{metric} by {by}"))
        if by == "attention":
            return None, noise
        names = [name for name in linears_of(program, part) if name not in left]
        wanted = [Statistic("rows", name) for name in names]
        wanted += [need for name in names for need in (nearest.needs(name) if nearest else ())]
        observers[part.name] = Observers(wanted, peers(mixtures(program)))
        return observers[part.name], None

    for block in float_blocks(program, ids, max(1, MICROBATCH // ids.shape[1]), compute, watch):
        if by == "attention":
            continue
        statistics = observers.pop(block.part.name).results()
        rows = {need.module: seen for need, seen in statistics.items() if need.kind == "rows"}
        quantized, schemes = (
            nearest.of(block.part.name, block.tensors, rows, statistics) if nearest else ({}, {})
        )
        if nearest is not None and by == "layer":
            hook = quantized_linears(quantized, schemes, compute)
            found[block.part.name] = _layer_error(block, hook)
            continue
        scores = {
            name: _linear_error(
                seen, block.weight(program, name), quantized.get(name), schemes.get(name, FLOAT)
            )
            if nearest is not None
            else UNARY[metric](seen)
            for name, seen in rows.items()
        }
        found |= scores if by == "linear" else {block.part.name: max(scores.values(), default=0.0)}
    found |= {attentions[node]: error for node, error in noise.errors().items()}
    return ranked(found)


def linears_of(program: Program, part: Part) -> list[str]:
    """The linears of a part, in graph order."""
    names = (str(node.target) for node in program.nodes(part) if node.op == "call_module")
    return [name for name in dict.fromkeys(names) if program.leaves[name].kind == "linear"]


def std(rows: Tensor) -> float:
    """The largest magnitude over the largest standard deviation of a channel."""
    deviation = float((rows.double() - rows.double().mean(0)).square().mean(0).sqrt().max())
    return float(rows.abs().max()) / deviation if deviation > 0 else 0.0


def quantile(rows: Tensor) -> float:
    """The step of an int8 grid of all values over the distance of their quartiles."""
    x = rows.flatten().double().sort().values
    low, high = (float(x[round(share * (len(x) - 1))]) for share in (0.25, 0.75))
    return 2 * float(rows.abs().max()) / 254 / (high - low + 1e-10)


UNARY: Mapping[str, Callable[[Tensor], float]] = {
    "kurtosis": lambda rows: kurtosis(rows.double()),
    "std": std,
    "quantile": quantile,
}


def _linear_error(rows: Tensor, weight: Tensor, q: QuantizedLinear | None, scheme: LinearScheme) -> float:
    if q is None:
        return 0.0
    y = rows @ weight.T
    noisy = fake_act(rows, scheme, q) @ q.dense.T
    return float((noisy - y).norm() / y.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _layer_error(block: FloatBlock, hook: LinearHook) -> float:
    """The relative error of what a block hands on, each token over its own size, with linears as a hook has them."""
    return error_of(block.outputs, block.run(hook)) ** 0.5


def to_exclude(program: Program, scores: Iterable[Score], by: str, top: int) -> list[str]:
    """Globs of the ``top`` worst, for ``exclude``; linears that a server runs as one come together.

    So do the experts of a layer, which have one type and in many checkpoints one tensor.
    """
    together, found = read_together(program), dict[str, None]()
    experts = _experts(program) if by == "linear" else {}
    ranked = list(scores)
    worst = ranked[:top] + [s for s in ranked[top:] if top and s.value == ranked[top - 1].value]
    for score in worst:
        if by == "layer":
            found[f"{score.name}.*"] = None
            continue
        if score.name in experts:
            found |= dict.fromkeys(experts[score.name])
            continue
        parent = score.name.rpartition(".")[0]
        beside = together.get(score.name, (score.name,)) if by == "linear" else (score.name,)
        found |= {name: None for name in beside if name.rpartition(".")[0] == parent}
    return list(found)


def _experts(program: Program) -> dict[str, tuple[str, ...]]:
    """For each linear of an expert the globs of all experts of its layer: one where one matches nothing else."""
    found: dict[str, tuple[str, ...]] = {}
    for mixture in mixtures(program):
        names = [name for expert in mixture for name in expert]
        columns = zip(*(name.split(".") for name in names), strict=False)
        shared = takewhile(lambda column: len(set(column)) == 1, columns)
        glob = ".".join([*(column[0] for column in shared), "*"])
        others = [n for n, leaf in program.leaves.items() if leaf.kind == "linear" and n not in names]
        alone = not any(matches(name, (glob,)) for name in others)
        found |= dict.fromkeys(names, (glob,) if alone else tuple(names))
    return found


def title(found: Analysis) -> str:
    """What was looked at, and how."""
    rounded = f" in {found.scheme}" if found.scheme else ""
    metric = "KL in nats per token" if found.metric == "kl" else found.metric
    return f"{metric} by {found.by}{rounded}, {len(found.scores)} in all; more is worse"


def report_svg(found: Analysis) -> str:
    """All scores as bars, the worst first."""
    return bars(title(found), [(score.name, score.value) for score in found.scores])


def report_text(found: Analysis) -> str:
    """A table with bars, the worst first, and a list that can be pasted."""
    lines = [title(found), ""]
    most = max(abs(score.value) for score in found.scores) or 1.0
    width = max(len(score.name) for score in found.scores)
    shown = found.scores[: max(len(found.exclude), SHOWN)]
    for rank, score in enumerate(shown, 1):
        bar = "█" * round(BAR * max(score.value, 0.0) / most)
        lines.append(f"{rank:4}  {score.name:{width}}  {score.value:10.4g}  {bar}".rstrip())
    if len(found.scores) > len(shown):
        lines.append(f"      and {len(found.scores) - len(shown)} more, down to {found.scores[-1].value:.4g}")
    return "\n".join([*lines, "", "exclude:", *(f'- "{glob}"' for glob in found.exclude)])
