"""MMLU: English exams in 57 subjects."""

from __future__ import annotations

from dataclasses import dataclass

from .exam import Exam


@dataclass(frozen=True, kw_only=True)
class Mmlu(Exam):
    """``val/SUBJECT_val.csv``, else ``test/SUBJECT_test.csv``, without a header.

    **Source.** MMLU (arXiv 2009.03300), ``cais/mmlu``.
    """

    what = (
        "MMLU is a directory with val/SUBJECT_val.csv or test/SUBJECT_test.csv, "
        "six columns without a header: question, four choices, letter"
    )
    splits = ("val", "test")
    header = False
    intro = "The following are multiple choice questions (with answers) about {subject}."
