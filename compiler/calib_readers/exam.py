"""Exams: one CSV file per subject and split, four choices per question."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import Refused
from .question import Question, listing, text_of

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Item:
    """A row of a sheet."""

    question: str
    choices: tuple[str, ...]
    """The texts of the four choices."""
    answer: str
    """The letter of the right one."""

    @property
    def prompt(self) -> str:
        """Question and choices, up to where the letter of the answer belongs."""
        lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, self.choices, strict=True)]
        return "\n".join([self.question, *lines, "Answer:"])


def questions(
    folder: Path, splits: Sequence[str], shots: int, what: str, header: bool, intro: str
) -> list[Question]:
    """The questions of all subjects of a folder, each after ``shots`` solved ones of its subject.

    Args:
        folder: Holds ``SPLIT/SUBJECT_SPLIT.csv``.
        splits: Where questions come from: the first split that is there. Solved ones come from ``dev``.
        shots: How many solved questions precede.
        what: What the format is, for refusals.
        header: Whether the first row names the columns.
        intro: The line above solved questions, with ``{subject}``.
    """
    if not folder.is_dir():
        found = "this is a file" if folder.exists() else "no such directory"
        raise Refused(f"{folder}: {found}; {what}")
    split = next((split for split in splits if sheets(folder, split)), None)
    if split is None:
        raise Refused(f"{folder}: {what}; {listing(folder)}")
    solved, found = sheets(folder, "dev"), list[Question]()
    for subject, sheet in sheets(folder, split).items():
        own = items(sheet, what, header)
        before = items(solved[subject], what, header) if shots and subject in solved else []
        if len(before) < shots:
            raise Refused(
                f"{folder}/dev/{subject}_dev.csv: {len(before)} solved questions, and shots is {shots}: "
                f"choose shots <= {len(before)}"
            )
        head = intro.format(subject=subject.replace("_", " ")) + "\n\n" if shots else ""
        head += "".join(f"{item.prompt} {item.answer}\n\n" for item in before[:shots])
        found += [Question(head + item.prompt, item.answer, LETTERS, subject) for item in own]
    return found


def sheets(folder: Path, split: str) -> dict[str, Path]:
    """Subject to file of a split."""
    end = f"_{split}.csv"
    return {file.name.removesuffix(end): file for file in sorted((folder / split).glob(f"*{end}"))}


def items(sheet: Path, what: str, header: bool) -> list[Item]:
    """The rows of a sheet. Refused where one is no question with four choices and a letter."""
    rows = list(csv.reader(io.StringIO(text_of(sheet, what), newline="")))
    columns = [*range(6)]
    if header:
        names = [name.strip() for name in rows[0]] if rows else []
        wanted = ("question", *LETTERS, "answer")
        if not set(wanted) <= set(names):
            raise Refused(f"{sheet}: {what}; the first row is {','.join(names)[:60] or 'empty'}")
        columns, rows = [names.index(name) for name in wanted], rows[1:]
    found: list[Item] = []
    for number, row in enumerate(rows, start=1 + header):
        if not any(cell.strip() for cell in row):
            continue
        if (
            len(row) <= max(columns)
            or row[columns[-1]].strip() not in LETTERS
            or (not header and len(row) != 6)
        ):
            raise Refused(
                f"{sheet}, row {number}: {what}; this row is {','.join(row)[:60]!r}, {len(row)} columns"
            )
        question, *choices, answer = (row[column].strip() for column in columns)
        found.append(Item(question, tuple(choices), answer))
    return found
