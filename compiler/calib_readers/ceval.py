"""C-Eval: Chinese exams in 52 subjects."""

from __future__ import annotations

from dataclasses import dataclass

from .exam import Exam


@dataclass(frozen=True, kw_only=True)
class Ceval(Exam):
    """``val/SUBJECT_val.csv`` and ``dev/SUBJECT_dev.csv`` with a header; ``test`` has no answers and is not read.

    **Source.** C-Eval (arXiv 2305.08322), ``ceval/ceval-exam``.
    """

    shots: int = 5

    what = (
        "C-Eval is a directory with val/SUBJECT_val.csv and dev/SUBJECT_dev.csv, "
        "each with a first row that names question, A, B, C, D and answer"
    )
    splits = ("val",)
    header = True
    intro = "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。"
