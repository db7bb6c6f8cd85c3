"""MMLU: English exams in 57 subjects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .exam import questions
from .question import Question, Reader

WHAT = (
    "MMLU is a directory with val/SUBJECT_val.csv or test/SUBJECT_test.csv, "
    "six columns without a header: question, four choices, letter"
)
INTRO = "The following are multiple choice questions (with answers) about {subject}."


@dataclass(frozen=True, kw_only=True)
class Mmlu(Reader):
    """``val/SUBJECT_val.csv``, else ``test/SUBJECT_test.csv``, without a header.

    **Source.** MMLU (arXiv 2009.03300), ``cais/mmlu``.
    """

    shots: int = 0
    """Solved questions of the subject, from ``dev``, that precede each question."""

    def read(self, path: Path) -> list[Question]:
        """The questions of all subjects."""
        return questions(path, ("val", "test"), self.shots, WHAT, False, INTRO)
