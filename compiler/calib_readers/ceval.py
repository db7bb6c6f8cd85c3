"""C-Eval: Chinese exams in 52 subjects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .exam import questions
from .question import Question, Reader

WHAT = (
    "C-Eval is a directory with val/SUBJECT_val.csv and dev/SUBJECT_dev.csv, "
    "each with a first row that names question, A, B, C, D and answer"
)
INTRO = "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。"


@dataclass(frozen=True, kw_only=True)
class Ceval(Reader):
    """``val/SUBJECT_val.csv`` and ``dev/SUBJECT_dev.csv`` with a header; questions come from ``val``.

    **Source.** C-Eval (arXiv 2305.08322), ``ceval/ceval-exam``.
    """

    shots: int = 5
    """Solved questions of the subject, from ``dev``, that precede each question."""

    def read(self, path: Path) -> list[Question]:
        """Each question after the solved ones of its subject. ``test`` has no answers and is not read."""
        return questions(path, ("val",), self.shots, WHAT, True, INTRO)
