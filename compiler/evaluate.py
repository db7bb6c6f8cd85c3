"""Evaluate: what quantization cost, as perplexity, divergence and agreement with the float model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..runtime.phase import set_phase
from .calibration import read_texts, windows_of
from .calibration import windows as cut
from .errors import Refused
from .half_linear import HalfLinear, has_half_units
from .layer_error import LayerError, layer_errors
from .load import load, load_tokenizer
from .tasks import check_library

ROWS = 128
"""Positions whose distributions over the vocabulary are compared at once."""

Logits = Callable[[Tensor], Tensor]
"""Token ids [1, length] to logits [1, length, vocabulary]."""


@dataclass(frozen=True)
class Evaluation:
    """A quantized model beside its float reference on the same windows of text."""

    windows: int
    length: int
    nll: float
    """Mean negative log-likelihood per predicted token, in nats."""
    nll_error: float
    """Standard error of ``nll`` over windows."""
    reference_nll: float
    reference_nll_error: float
    difference_error: float
    """Standard error over windows of the paired difference ``nll - reference_nll``."""
    kl: float
    """Mean over tokens of KL(reference || quantized), in nats."""
    kl_error: float
    """Standard error of ``kl`` over windows."""
    agreement: float
    """Share of positions at which both models think the same token the likeliest."""

    @property
    def perplexity(self) -> float:
        """exp of ``nll``."""
        return math.exp(self.nll)

    @property
    def reference_perplexity(self) -> float:
        """exp of ``reference_nll``."""
        return math.exp(self.reference_nll)

    @property
    def ratio(self) -> float:
        """Perplexity as a multiple of the reference's."""
        return math.exp(self.nll - self.reference_nll)

    @property
    def within_noise(self) -> bool:
        """Whether the difference of the two is inside its own standard error."""
        return abs(self.nll - self.reference_nll) <= self.difference_error


def evaluate(
    path: str | Path,
    reference: str | Path,
    text_file: str | Path,
    *,
    windows: int = 40,
    length: int = 512,
    clean: bool = True,
    dtype: torch.dtype | None = None,
    phase: str | None = None,
) -> Evaluation:
    """Compare the model in ``path`` with the one in ``reference`` on a text.

    Both are loaded from their files; log-probabilities are taken in float32. The text is tokenized once by
    the reference's tokenizer and cut; the first ``windows`` pieces are used.

    Args:
        path: A directory that ``load`` takes, quantized or not.
        reference: The float checkpoint it was made from.
        text_file: Text, as calibration text is read.
        windows: How many windows; fewer where the text is shorter.
        length: Tokens of a window; each is predicted from those before it in the window.
        clean: Undo WikiText's separators first (see :func:`undo_separators`).
        dtype: In which floats run; default, each model's own.
        phase: ``prefill`` or ``decode``, for linears that have two arithmetics (W8A8_MIX); None is prefill.

    Raises:
        Refused: What ``load`` and ``calibration`` refuse; two vocabularies; a phase for a model without such linears.
    """
    return measure(
        path, reference, text_file, windows=windows, length=length, clean=clean, dtype=dtype, phase=phase
    )[0]


def measure(
    path: str | Path, reference: str | Path, text_file: str | Path, *, windows: int = 40, length: int = 512,
    clean: bool = True, dtype: torch.dtype | None = None, phase: str | None = None, by: str | None = None,
) -> tuple[Evaluation, tuple[LayerError, ...]]:  # fmt: skip
    """``evaluate``, and with ``by="layer"`` the error of every layer on the same windows."""
    if windows < 1:
        raise Refused(f"--windows {windows}: at least one window is compared")
    texts = read_texts([text_file])
    tokenizer = load_tokenizer(reference)
    tokens = cut(
        [undo_separators(text) if clean else text for text in texts],
        tokenizer,
        samples=windows,
        length=length,
    )
    models = [load(directory, dtype=dtype) for directory in (path, reference)]
    prepared(path, models[0], phase)
    sizes = [model.get_input_embeddings().get_parameter("weight").shape[0] for model in models]
    if sizes[0] != sizes[1]:
        raise Refused(
            f"{path} has a vocabulary of {sizes[0]}, {reference} one of {sizes[1]}: not the same model"
        )
    if int(tokens.max()) >= sizes[0]:
        raise Refused(
            f"the tokenizer of {reference} gives token {int(tokens.max())}, and its vocabulary has {sizes[0]}:"
            " the tokenizer belongs to another model"
        )
    quantized, original = ((lambda ids, m=m: m(input_ids=ids, use_cache=False).logits) for m in models)
    with nullcontext() if has_half_units() else HalfLinear():
        try:
            found = compare(quantized, original, tokens)
        except IndexError as error:
            raise Refused(
                f"{path} has no position for every token of a window of {length}: choose a smaller --length"
            ) from error
        return found, layer_errors(*models, tokens) if by == "layer" else ()


def prepared(path: str | Path, model: nn.Module, phase: str | None) -> nn.Module:
    """A loaded model in a phase. Refused where none of its linears has two, so that the word would mean nothing."""
    if phase is not None and not set_phase(model, phase):
        raise Refused(
            f"--phase {phase}: no linear of {path} computes otherwise in decode than in prefill (type W8A8_MIX);"
            " leave it out"
        )
    return model


def check_asked(
    *, text: str | None, tasks: str | None, reference: str | None, by: str | None, plot: str | None,
    limit: int | None = None, batch: int = 1,
) -> None:  # fmt: skip
    """Refuse options of ``qc eval`` that do not go together, before anything is loaded."""
    wrong = {
        "nothing to measure: give --text FILE, --tasks LIST, or both": text is None and tasks is None,
        "--text compares with the float model: give --reference MODEL": text is not None
        and reference is None,
        f"--by {by} needs a text: give --text FILE": by is not None and text is None,
        "--plot draws the errors of layers: give --by layer": plot is not None and by is None,
        f"--limit {limit}: at least one document per task": limit is not None and limit < 1,
        f"--batch {batch}: at least one sequence": batch < 1,
    }
    for message, found in wrong.items():
        if found:
            raise Refused(message)
    if tasks is not None:
        check_library()


@torch.no_grad()
def compare(quantized: Logits, reference: Logits, tokens: Tensor) -> Evaluation:
    """The evaluation of two functions to logits on windows of tokens, int64 [windows, length].

    One window runs at a time, so memory holds two sets of logits of one window. Refused where a model's
    log-likelihood is not finite.
    """
    rows = [_window(quantized(ids), reference(ids), ids) for ids in tokens.split(1)]
    values = torch.tensor(rows, dtype=torch.float64)
    if not values.isfinite().all():
        bad = int((~values.isfinite()).any(1).nonzero()[0])
        raise Refused(f"window {bad} has a log-likelihood that is not finite: a model overflows on this text")
    nll, reference_nll, kl, agreement = values.mean(0).tolist()
    return Evaluation(
        windows=tokens.shape[0],
        length=tokens.shape[1],
        nll=nll,
        nll_error=_error(values[:, 0]),
        reference_nll=reference_nll,
        reference_nll_error=_error(values[:, 1]),
        difference_error=_error(values[:, 0] - values[:, 1]),
        kl=kl,
        kl_error=_error(values[:, 2]),
        agreement=agreement,
    )


def _window(quantized: Tensor, reference: Tensor, ids: Tensor) -> tuple[float, float, float, float]:
    """Means over the predicted tokens of one window: both NLLs, the divergence, the agreement."""
    sums = torch.zeros(4, dtype=torch.float64)
    targets = ids[0, 1:]
    for start in range(0, len(targets), ROWS):
        here = slice(start, min(start + ROWS, len(targets)))
        q, p = (logits[0, here].to(torch.float32).log_softmax(-1) for logits in (quantized, reference))
        index = targets[here].unsqueeze(1)
        sums[0] -= q.gather(1, index).sum(dtype=torch.float64)
        sums[1] -= p.gather(1, index).sum(dtype=torch.float64)
        sums[2] += (p.exp() * (p - q)).sum(dtype=torch.float64)
        sums[3] += (q.argmax(-1) == p.argmax(-1)).sum()
    nll, reference_nll, kl, agreement = (sums / len(targets)).tolist()
    return nll, reference_nll, kl, agreement


def _error(values: Tensor) -> float:
    """Standard error of the mean; infinite for a single value, which says nothing about it."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf


def undo_separators(text: str) -> str:
    """Undo WikiText's separators inside words and numbers: ``@-@``, ``@,@`` and ``@.@`` between spaces."""
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    return text


def format(evaluation: Evaluation) -> str:
    """The evaluation as a small table; a sentence says when the difference means nothing."""
    e = evaluation
    rows = [
        (windows_of(e.windows, e.length), "quantized", "reference"),
        (
            "perplexity",
            _plus_minus(e.perplexity, e.perplexity * e.nll_error, 3),
            _plus_minus(e.reference_perplexity, e.reference_perplexity * e.reference_nll_error, 3),
        ),
        ("multiple of the reference's", _plus_minus(e.ratio, e.ratio * e.difference_error, 4), ""),
        ("KL per token, nats", _plus_minus(e.kl, e.kl_error, 5), ""),
        ("top-1 agreement", f"{e.agreement:.2%}", ""),
    ]
    lines = [f"{name:<28}{left:<22}{right}".rstrip() for name, left, right in rows]
    if e.within_noise:
        lines.append("The difference in perplexity is inside its standard error over windows.")
    return "\n".join(lines)


def _plus_minus(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f} ± {error:.{digits}f}"
