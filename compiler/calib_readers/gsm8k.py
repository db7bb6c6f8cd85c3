"""GSM8K: grade school mathematics in words, with the solution written out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import Refused
from .question import Answers, Question, Reader, file_in, objects_of

WHAT = "GSM8K has one object per line, with question and answer; the answer ends in #### and a number"
KEYS = {"question": str, "answer": str}
FILES = ("train.jsonl", "test.jsonl")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
LONGEST = 256
"""Tokens in which a model has to come to its result."""


@dataclass(frozen=True, kw_only=True)
class Gsm8k(Reader):
    """``.jsonl`` of ``{"question", "answer": "... #### 42"}``.

    **Source.** GSM8K (arXiv 2110.14168), ``openai/gsm8k``.
    """

    def read(self, path: Path) -> list[Question]:
        """The question, and the number behind ``####``."""
        found: list[Question] = []
        for where, item in objects_of(file_in(path, FILES, WHAT), WHAT, KEYS):
            _, mark, result = item["answer"].rpartition("####")
            number = NUMBER.search(result)
            if not mark or number is None:
                raise Refused(f"{where}: {WHAT}; this one ends in {item['answer'][-30:]!r}")
            prompt = f"Question: {item['question']}\nLet's think step by step\nAnswer:"
            found.append(Question(prompt, plain(number[0])))
        return found

    def right(self, question: Question, model: Answers) -> bool:
        """Whether the result that the model comes to is the right number: what follows ``####``, else its last one.

        What it says after the answer, from a next ``Question:`` on, does not count.
        """
        said = model.continued(question.prompt, LONGEST).partition("Question:")[0]
        marked = NUMBER.search(said.partition("####")[2])
        numbers = [marked[0]] if marked else NUMBER.findall(said)
        return bool(numbers) and plain(numbers[-1]) == question.answer


def plain(number: str) -> str:
    """A number as it is compared: ``1,200.00`` is ``1200``."""
    digits = number.replace(",", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
