"""Exams: one CSV file per subject and split, four choices per question."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..errors import Refused
from .question import Question, Reader, listing, text_of

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


@dataclass(frozen=True, kw_only=True)
class Exam(Reader):
    """``SPLIT/SUBJECT_SPLIT.csv`` below a directory; each question may follow solved ones of its subject."""

    shots: int = 0
    """Solved questions of the subject, from ``dev``, that precede each question."""

    what: ClassVar[str]
    """What the format is, for refusals."""
    splits: ClassVar[tuple[str, ...]]
    """Where questions come from: the first split that is there."""
    header: ClassVar[bool]
    """Whether the first row names the columns."""
    intro: ClassVar[str]
    """The line above solved questions, with ``{subject}``."""

    def read(self, path: Path) -> list[Question]:
        """The questions of all subjects."""
        if not path.is_dir():
            found = "this is a file" if path.exists() else "no such directory"
            raise Refused(f"{path}: {found}; {self.what}")
        split = next((split for split in self.splits if sheets(path, split)), None)
        if split is None:
            raise Refused(f"{path}: {self.what}; {listing(path)}")
        solved, found = sheets(path, "dev"), list[Question]()
        for subject, sheet in sheets(path, split).items():
            own = items(sheet, self.what, self.header)
            before = (
                items(solved[subject], self.what, self.header) if self.shots and subject in solved else []
            )
            if len(before) < self.shots:
                raise Refused(
                    f"{path}/dev/{subject}_dev.csv: {len(before)} solved questions, and shots is {self.shots}: "
                    f"choose shots <= {len(before)}"
                )
            head = self.intro.format(subject=subject.replace("_", " ")) + "\n\n" if self.shots else ""
            head += "".join(f"{item.prompt} {item.answer}\n\n" for item in before[: self.shots])
            found += [Question(head + item.prompt, item.answer, LETTERS, subject) for item in own]
        return found


def sheets(folder: Path, split: str) -> dict[str, Path]:
    """Subject to file of a split."""
    end = f"_{split}.csv"
    return {file.name.removesuffix(end): file for file in sorted((folder / split).glob(f"*{end}"))}


def items(sheet: Path, what: str, header: bool) -> list[Item]:
    """The rows of a sheet. Refused where one is no question with four choices and a letter."""
    read = csv.reader(io.StringIO(text_of(sheet, what), newline=""))
    try:
        rows = list(read)
    except csv.Error as error:
        raise Refused(f"{sheet}, line {read.line_num}: not readable as CSV ({error}); {what}") from None
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
