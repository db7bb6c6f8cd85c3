"""BoolQ: yes or no questions about a passage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .question import Question, Reader, file_in, objects_of

WHAT = "BoolQ has one object per line, with question, passage and answer (true or false)"
KEYS = {"question": str, "passage": str, "answer": bool}
FILES = ("train.jsonl", "dev.jsonl")
"""In a directory the first that is there: what is calibrated on should not be what is evaluated on."""


@dataclass(frozen=True, kw_only=True)
class Boolq(Reader):
    """``.jsonl`` of ``{"question", "passage", "answer": true, "title"}``.

    **Source.** BoolQ (arXiv 1905.10044), ``google/boolq``.
    """

    def read(self, path: Path) -> list[Question]:
        """Passage, question, and yes or no."""
        found: list[Question] = []
        for _, item in objects_of(file_in(path, FILES, WHAT), WHAT, KEYS):
            title = f"{item['title']} -- " if item.get("title") else ""
            prompt = f"{title}{item['passage']}\nQuestion: {item['question'].rstrip('?')}?\nAnswer:"
            found.append(Question(prompt, "yes" if item["answer"] else "no", ("yes", "no")))
        return found
