"""Question: one sample of a data set; Reader: how the files of a data set become questions."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..calibration import check_unicode
from ..errors import Refused


@dataclass(frozen=True)
class Question:
    """One sample: what the model is asked, and the answer that is right."""

    prompt: str
    """The text that calibrates, up to where the answer begins."""
    answer: str
    choices: tuple[str, ...] = ()
    """Of a multiple choice question all answers that it offers, ``answer`` among them."""
    subject: str = ""
    """Where a set has several: a mix takes as many of one as of another."""


class TooLong(Exception):
    """A question needs more positions than the model has: it cannot be asked."""


class Answers(Protocol):
    """A model that answers: see ``compiler.calib_answers``. Both raise TooLong for what it cannot be asked."""

    def likeliest(self, prompt: str, choices: Sequence[str]) -> str:
        """The choice to which the model gives the highest log-likelihood after the prompt."""
        ...

    def continued(self, prompt: str, longest: int) -> str:
        """The greedy continuation of the prompt, at most ``longest`` tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reader(ABC):
    """A data set's format: a frozen dataclass, whose fields are options that stand beside the path in a config."""

    @abstractmethod
    def read(self, path: Path) -> list[Question]:
        """All questions below a path, in the order of the files.

        Raises:
            Refused: The path does not look like this kind; the message says what was found there.
        """

    def right(self, question: Question, model: Answers) -> bool:
        """Whether a model answers right: its likeliest choice, or else what it says first, is the answer."""
        if question.choices:
            return model.likeliest(question.prompt, question.choices) == question.answer
        return model.continued(question.prompt, 32).strip().startswith(question.answer)


def objects_of(path: Path, what: str, keys: Mapping[str, type]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a ``.jsonl`` file with their places.

    Refused for a line that is none, lacks one of the keys, or has something of another type there.
    """
    for number, line in enumerate(text_of(path, what).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise Refused(f"{where}: not readable as JSON ({error.msg}); {what}") from None
        if not isinstance(item, dict):
            raise Refused(f"{where}: {what}; this is {json.dumps(item)[:40]}")
        check_unicode(item, where)
        if any(key not in item for key in keys):
            raise Refused(f"{where}: {what}; this one has {', '.join(item) or 'no keys'}")
        for key, kind in keys.items():
            if not isinstance(item[key], kind):
                raise Refused(f"{where}: {what}; this {key} is {json.dumps(item[key])[:40]}")
        yield where, item


def text_of(path: Path, what: str) -> str:
    """A text file; Refused where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: not UTF-8 text (byte {error.start}); {what}") from None
    except FileNotFoundError:
        raise Refused(f"{path}: no such file; {what}") from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from None


def file_in(path: Path, names: Sequence[str], what: str) -> Path:
    """The path itself where it is a file; of a directory the first of some files that is there."""
    if not path.is_dir():
        return path
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise Refused(f"{path}: {what}, in {' or '.join(names)}; {listing(path)}")
    return found


def listing(folder: Path) -> str:
    """What a directory holds, for a refusal."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    parquet = any(name.endswith(".parquet") for name in names)
    hint = ". Parquet is not read: take the text files of the set" if parquet else ""
    return f"it holds {', '.join(names[:5]) or 'nothing'}{more}{hint}"
