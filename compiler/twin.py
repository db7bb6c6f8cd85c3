"""The twin: a narrow copy of an architecture with random weights, small enough to run for real."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .canon import hint
from .capture_class import build
from .capture_model import KEPT, weight_dtype
from .narrow import sizes_of
from .program import Program
from .show.text import text

SPREAD = 0.2
"""Standard deviation of what is added to a vector parameter (a gain, a bias) of the twin."""


def random_model(
    config: Any, like: nn.Module | None, dtype: torch.dtype, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a config on CPU with random float32 weights; its buffers are what it makes in ``dtype``.

    ``like`` is a model whose class, and whose dtype of buffers, it gets instead.
    """
    with torch.random.fork_rng(devices=[]):
        if like is None:
            model = build(config, dtype, trust_remote_code=trust_remote_code)
        else:
            assert isinstance(like, PreTrainedModel)
            model = type(like)._from_config(config, dtype=weight_dtype(like))
    main = weight_dtype(model)
    kept = {
        name: p.dtype
        for name, p in model.named_parameters()
        if p.dtype.is_floating_point and p.dtype != main and p.dtype == torch.float32
    }
    setattr(model, KEPT, kept)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data = random_like(parameter.data, generator)
    return model.eval()


def random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values for a parameter: a vector stays near its value, a matrix keeps the scale of its input."""
    noise = torch.randn([hint(size) for size in tensor.shape], generator=generator, dtype=torch.float32)
    if tensor.ndim < 2:
        return tensor.detach().float() + SPREAD * noise
    return noise * (2.0 / tensor.shape[-1]) ** 0.5


@dataclass(frozen=True)
class Word:
    """A word of a program's text, and whether it is a number that follows from sizes."""

    text: str
    size: bool

    def same(self, other: Word) -> bool:
        """Whether two words are equal up to sizes."""
        return self.text == other.text or (self.size and other.size)


def outline(program: Program, layers: int) -> list[Word]:
    """The words of a program's first layers: integers, and floats that are powers of sizes, may differ."""
    sizes = sizes_of(program)
    powers = {round(v, 9) for s in sizes if s for v in (s**-0.5, s**0.5, 1 / s)}
    kept = [
        text(program, part=part) for part in (program.parts[0], *program.blocks[:layers], program.parts[-1])
    ]
    spaced = re.sub(r"([\[\](),])", r" \1 ", "\n".join(kept)).split()

    def size(word: str) -> bool:
        try:
            return float(word).is_integer() or round(float(word), 9) in powers
        except ValueError:
            return False

    return [Word(word, size(word)) for word in spaced]


def difference(left: list[Word], right: list[Word]) -> str:
    """Where two outlines differ first, or nothing."""
    for i, (a, b) in enumerate(zip_longest(left, right, fillvalue=Word("(end)", False))):
        if not a.same(b):
            lines = (" ".join(w.text for w in words[max(0, i - 12) : i + 4]) for words in (left, right))
            return "'{}' became '{}'".format(*lines)
    return ""
