"""Answers of the float model: the likeliest of some choices, or a greedy continuation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calib_readers.question import TooLong
from .errors import Refused
from .half_linear import HalfLinear, has_half_units
from .load import load, load_tokenizer


class ModelAnswers:
    """A checkpoint that answers questions; its weights are in memory as long as this is."""

    def __init__(self, path: str | Path) -> None:
        """``path`` is a directory that ``load`` takes, or a hub id. Raises Refused for what ``load`` refuses."""
        self.path = path
        self.tokenizer = load_tokenizer(path)
        self.model: Any = load(path)

    def likeliest(self, prompt: str, choices: Sequence[str]) -> str:
        """The choice whose tokens have the highest log-likelihood after the prompt, the sum over its tokens.

        Prompt and choice are joined by a blank and tokenized as one; where all choices are one token more than what
        they share, the model runs once. TooLong where the model has no position for all tokens, here and below.
        """
        rows = [self._ids(f"{prompt} {choice}") for choice in choices]
        shared = min(self._shared(rows), min(len(row) for row in rows) - 1)
        if shared < 1:
            raise Refused("a question is empty: nothing comes before its choices")
        self._check_length(max(map(len, rows)))
        with _fast_half(), torch.no_grad():
            if all(len(row) == shared + 1 for row in rows):
                (scores,) = self._scores(rows[0][:shared], shared)
                values = [float(scores[row[-1]]) for row in rows]
            else:
                values = [self._log_likelihood(row, shared) for row in rows]
        return choices[values.index(max(values))]

    def continued(self, prompt: str, longest: int) -> str:
        """The greedy continuation, without the prompt."""
        ids = torch.tensor([self._ids(prompt)])
        self._check_length(ids.shape[1] + longest)
        with _fast_half(), torch.no_grad():
            answer = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False,
                num_beams=1, temperature=None, top_p=None, top_k=None,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )  # fmt: skip
        return self.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        rows = self.model.get_input_embeddings().get_parameter("weight").shape[0]
        if ids and max(ids) >= rows:
            raise Refused(
                f"{self.path}: the tokenizer gives token {max(ids)}, and the model's vocabulary has {rows}: the"
                " tokenizer belongs to another model"
            )
        return ids

    def _check_length(self, tokens: int) -> None:
        """TooLong where the model has no position for so many tokens."""
        positions = getattr(self.model.config, "max_position_embeddings", tokens)
        if tokens > positions:
            raise TooLong(f"{tokens} tokens, and {self.path} has {positions} positions")

    @staticmethod
    def _shared(rows: Sequence[Sequence[int]]) -> int:
        """Tokens at the beginning that all rows have in common."""
        columns = zip(*rows, strict=False)
        return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, rows)))

    def _scores(self, ids: Sequence[int], start: int) -> Tensor:
        """Log-probabilities of what follows each of the tokens from ``start - 1`` on: [n, vocabulary], float32."""
        logits = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
        return logits[0, start - 1 :].float().log_softmax(-1)

    def _log_likelihood(self, ids: Sequence[int], start: int) -> float:
        """Of the tokens from ``start`` on, given those before."""
        targets = torch.tensor(list(ids[start:]))
        return float(self._scores(ids, start)[:-1].gather(1, targets[:, None]).sum())


@contextmanager
def _fast_half() -> Iterator[None]:
    with nullcontext() if has_half_units() else HalfLinear():
        yield
