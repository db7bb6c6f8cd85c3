"""Mix: a calibration set drawn from several data sets, balanced, and of questions that a model answers right."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import registry
from .calib_file import write_samples
from .calib_readers.question import Answers, Question, Reader, TooLong
from .errors import Refused

GROUP = "calibration_readers"
PATIENCE = 100
"""Questions of one answer that a model gets wrong one after another before the answer is given up."""
KEYS = ("dataset_name", "dataset_path")


@dataclass(frozen=True)
class DataSet:
    """An entry of a config: a name of its own, where its files are, and who reads them."""

    name: str
    path: Path
    reader: Reader


@dataclass
class Drawn:
    """What was taken of one set."""

    name: str
    available: int
    questions: list[Question] = field(default_factory=list)
    asked: int = 0
    """Questions that a model was asked; 0 where none was."""
    too_long: int = 0
    """Questions that it could not be asked, because they are longer than it has positions for."""

    def __str__(self) -> str:
        answers = Counter(question.answer for question in self.questions if question.choices)
        subjects = {question.subject for question in self.questions if question.subject}
        parts = [f"{count} {answer}" for answer, count in sorted(answers.items())]
        parts += [f"{len(subjects)} subject{'s' * (len(subjects) > 1)}"] if subjects else []
        inside = f" ({', '.join(parts)})" if parts else ""
        asked = f", the model was asked {self.asked}" if self.asked else ""
        asked += f", {self.too_long} more are too long for it" if self.too_long else ""
        return f"{self.name}: {len(self.questions)} of {self.available}{inside}{asked}"


@dataclass(frozen=True)
class Mix:
    """A mixed calibration set."""

    path: Path
    sets: tuple[Drawn, ...]
    samples: tuple[Mapping[str, str], ...]
    """As they were written: ``prompt``, ``ans``, ``dataset``, and ``subject`` where there is one."""


Report = Callable[[str, int, int], None]
"""Told of a set, how many of its questions are found, and how many are wanted."""


def mix(
    config: str | Path | Mapping[str, str | Path], sizes: Mapping[str, int], out: str | Path, *,
    positive: str | Path | Answers | None = None, seed: int = 0, readers: Mapping[str, Reader] | None = None,
    force: bool = False, report: Report = lambda name, found, wanted: None,
) -> Mix:  # fmt: skip
    """Draw questions from data sets and write them as calibration text.

    Args:
        config: A file as ``read_config`` takes it, or paths by the name of a registered reader.
        sizes: How many questions of each set.
        out: The ``.jsonl`` (or ``.json``) to write; ``--calib`` reads it.
        positive: A model; only questions that it answers right are taken.
        seed: Of the drawing. What is drawn of one set does not depend on the others.
        readers: More readers, by the name of their set.
        force: Replace ``out`` when it exists.
        report: Told of the progress with a model.

    Raises:
        Refused: A config or a set is not what it should be, a set has fewer questions, or the model answers too few.
    """
    given = readers or {}
    if isinstance(config, Mapping):
        sets = {
            name: DataSet(name, Path(path), reader_of(name, given, {}, name)) for name, path in config.items()
        }
    else:
        sets = read_config(config, given)
    if not sets:
        raise Refused("no data sets: give their paths by the names of their readers")
    if not sizes:
        raise Refused(f"no sizes: say how many questions of each set, such as --size {next(iter(sets))}=4")
    for name, size in sizes.items():
        if name not in sets:
            raise Refused(registry.unknown("set", name, sets))
        if size < 1:
            raise Refused(f"--size {name}={size}: at least 1; leave the set out to take none")
    paths = [sets[name].path for name in sizes] + ([Path(config)] if isinstance(config, str | Path) else [])
    target = write_samples(out, None, force=force, inputs=paths)
    questions = {name: _read(sets[name], size) for name, size in sizes.items()}
    answers = _answers(positive)
    drawn = [
        _draw(sets[name], questions[name], size, seed, answers, str(positive), report)
        for name, size in sizes.items()
    ]
    samples = [
        {"prompt": q.prompt, "ans": q.answer, "dataset": one.name}
        | ({"subject": q.subject} if q.subject else {})
        for one in drawn
        for q in one.questions
    ]
    random.Random(f"{seed}").shuffle(samples)
    write_samples(target, samples, force=force, inputs=paths)
    return Mix(target, tuple(drawn), tuple(samples))


def read_config(path: str | Path, readers: Mapping[str, Reader] | None = None) -> dict[str, DataSet]:
    """The data sets of a config, by name.

    The file is ``{"configurations": [{"dataset_name": ..., "dataset_path": ...}, ...]}``, paths relative to it. The
    name is that of a reader, or ``reader`` names one; other keys are options of the reader.

    Raises:
        Refused: It cannot be read, or an entry is not as it should be: which one, and what is wrong.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise Refused(f"{path}: no such file; give a JSON file that lists data sets") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise Refused(
            f"{path}, line {error.lineno}: not readable as JSON: {error.msg} at column {error.colno}"
        ) from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from None
    entries = content.get("configurations") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise Refused(
            f'{path}: expected {{"configurations": [{{"dataset_name": ..., "dataset_path": ...}}, ...]}}, '
            f"{_found(content)}"
        )
    found: dict[str, DataSet] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{path}, configurations[{number}]"
        one = _data_set(entry, where, path.parent, readers or {})
        if one.name in found:
            raise Refused(
                f"{where}: there are two sets {one.name!r}; give one another dataset_name, and its reader"
            )
        found[one.name] = one
    return found


def parse_sizes(words: Sequence[str]) -> dict[str, int]:
    """``["boolq=4,gsm8k=3"]`` as sizes by name. Refused for what is none."""
    sizes: dict[str, int] = {}
    for word in (part.strip() for text in words for part in text.split(",") if part.strip()):
        name, equals, number = word.partition("=")
        if not equals or not number.isdecimal() or not name:
            raise Refused(f"--size {word}: give names and numbers, such as boolq=4,gsm8k=3")
        if name in sizes:
            raise Refused(f"--size: {name} is given twice")
        sizes[name] = int(number)
    return sizes


def reader_of(kind: str, given: Mapping[str, Reader], options: Mapping[str, Any], where: str) -> Reader:
    """A reader by its name, with options. Refused where there is none, or it has no such option."""
    if kind in given:
        if options:
            there = f"the reader {kind!r} that was given has its options already"
            raise Refused(f"{where}: {', '.join(options)}: {there}; leave the key out")
        return given[kind]
    known = registry.names(GROUP)
    if kind not in known:
        raise Refused(f"{where}: {registry.unknown('reader', kind, {**known, **given})}")
    cls = registry.get(GROUP, kind)
    fields = {one.name: one for one in dataclasses.fields(cls)}
    for key, value in options.items():
        if key not in fields:
            there = f"{kind} has {', '.join(fields) or 'no options'}"
            raise Refused(f"{where}: unknown key {key!r}; an entry has {', '.join(KEYS)}, reader; {there}")
        default = fields[key].default
        right = type(value) is type(default) or default is dataclasses.MISSING
        if not right or (isinstance(value, int) and value < 0):
            raise Refused(f"{where}: {key} is {json.dumps(value)}; it is {default!r} where nothing is given")
    needed = [
        name
        for name, one in fields.items()
        if one.default is one.default_factory is dataclasses.MISSING and name not in options
    ]
    if needed:
        raise Refused(f"{where}: no {', '.join(needed)}, which the reader {kind} needs")
    return cls(**options)


def _data_set(entry: object, where: str, folder: Path, readers: Mapping[str, Reader]) -> DataSet:
    if not isinstance(entry, dict):
        raise Refused(f"{where}: expected an object with {' and '.join(KEYS)}, {_found(entry)}")
    for key in KEYS:
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise Refused(f"{where}: no {key}; it has {', '.join(map(str, entry)) or 'no keys'}")
    name, path = entry["dataset_name"], folder / entry["dataset_path"]
    kind = entry.get("reader", name)
    options = {key: value for key, value in entry.items() if key not in (*KEYS, "reader")}
    return DataSet(name, path, reader_of(str(kind), readers, options, where))


def _found(value: object) -> str:
    if isinstance(value, dict):
        return f"this is an object with {', '.join(map(str, value)) or 'no keys'}"
    return f"this is {json.dumps(value)[:40]}"


def _read(one: DataSet, size: int) -> list[Question]:
    if not one.path.exists():
        raise Refused(f"set {one.name}: {one.path}: no such file or directory")
    questions = list(one.reader.read(one.path))
    if not questions:
        raise Refused(f"set {one.name}: {one.path} holds no question")
    if len(questions) < size:
        raise Refused(
            f"--size {one.name}={size}: {one.path} has {len(questions)} questions; choose at most {len(questions)}"
        )
    return questions


def _answers(positive: str | Path | Answers | None) -> Answers | None:
    if not isinstance(positive, str | Path):
        return positive
    from .calib_answers import ModelAnswers

    return ModelAnswers(positive)


def _draw(
    one: DataSet, questions: Sequence[Question], size: int, seed: int, answers: Answers | None, model: str,
    report: Report,
) -> Drawn:  # fmt: skip
    """``size`` questions, or Refused where a model answers fewer right."""
    drawn = Drawn(one.name, len(questions))

    def wanted(question: Question) -> bool | None:
        if answers is None:
            return True
        try:
            right = one.reader.right(question, answers)
        except TooLong:
            drawn.too_long += 1
            return None
        drawn.asked += 1
        report(one.name, len(drawn.questions) + right, size)
        return right

    for question in balanced(questions, random.Random(f"{seed} {one.name}"), wanted):
        drawn.questions.append(question)
        if len(drawn.questions) == size:
            return drawn
    much = f"choose at most {len(drawn.questions)}" if drawn.questions else "leave the set out, or --positive"
    asked = f"answers {len(drawn.questions)} of the {drawn.asked} questions right that it was asked"
    if drawn.too_long:
        long = f"{drawn.too_long} are longer than it has positions for"
        asked = f"{asked}, and {long}" if drawn.asked else f"was asked none of the questions: {long}"
    raise Refused(f"--size {one.name}={size} --positive {model}: the model {asked}; {much}")


def balanced(
    questions: Sequence[Question], random: random.Random,
    wanted: Callable[[Question], bool | None] = lambda question: True,
):  # fmt: skip
    """Wanted questions in a random order: subjects in turn, and within one the choice that came least so far.

    A subject that has no more is left out, and so is an answer after `PATIENCE` unwanted questions one after another;
    those of which ``wanted`` says None do not count.
    """
    subjects: dict[str, list[Question]] = {}
    for question in questions:
        subjects.setdefault(question.subject, []).append(question)
    left: dict[str, _Left] = {}
    for subject, own in subjects.items():
        random.shuffle(own)
        left[subject] = {}
        for place, question in enumerate(own):
            label = question.answer if question.choices else ""
            left[subject].setdefault(label, deque()).append((place, question))
    order = list(subjects)
    random.shuffle(order)
    turn, taken, misses = deque(order), Counter[str](), Counter[str]()
    while turn:
        subject = turn.popleft()
        while (label := _rarest(left[subject], taken, misses)) is not None:
            _, question = left[subject][label].popleft()
            answered = wanted(question)
            if answered:
                misses[label] = 0
                taken[label] += 1
                turn.append(subject)
                yield question
                break
            misses[label] += answered is not None


_Left = dict[str, deque[tuple[int, Question]]]
"""Questions of a subject that were not drawn, with their places in the order, by what they are balanced by."""


def _rarest(left: _Left, taken: Mapping[str, int], misses: Mapping[str, int]) -> str | None:
    """The answer that was taken least so far, of two the one whose question comes first; None where none is left."""
    open_ = [label for label, own in left.items() if own and misses.get(label, 0) < PATIENCE]
    return min(open_, key=lambda label: (taken.get(label, 0), left[label][0][0]), default=None)
