"""Calibration text: read from files, tokenized once, cut into windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import Refused

Tokenizer = Callable[..., Mapping[str, Any]]
"""Called as Hugging Face tokenizers are: ``tokenizer(text, verbose=False)["input_ids"]`` is a list of ids."""

TEXT_KEYS = ("inputs_pretokenized", "text", "prompt")
"""Where an object keeps its text; the first key that is there is taken."""
SUFFIXES = (".jsonl", ".json", ".txt")
SHIPPED = "calibration_default.txt"
"""Text of our own, beside this module, used when the user names no file."""
SEPARATOR = "\n\n"


@dataclass(frozen=True, eq=False)
class Calibration:
    """The token windows that a compile calibrates on, and where they came from."""

    tokens: Tensor
    """[n, length] int64, n at most the samples that were asked for."""
    available: int
    """Whole windows in the text: when it is less than the samples asked for, n is this."""
    files: tuple[str, ...]
    """The files read, in order; empty for the shipped text."""

    @property
    def digest(self) -> str:
        """sha256 of the token ids as little-endian int64, row by row."""
        return hashlib.sha256(self.tokens.contiguous().numpy().astype("<i8").tobytes()).hexdigest()

    def __str__(self) -> str:
        source = ", ".join(self.files) or f"the text that ships with qc ({self.available} windows)"
        return f"{windows_of(*self.tokens.shape)} from {source}"


def windows_of(count: int, length: int) -> str:
    """``4 windows of 64 tokens``."""
    return f"{count} window{'' if count == 1 else 's'} of {length} tokens"


def calibration(
    files: Sequence[str | Path], tokenizer: Tokenizer, *, samples: int = 32, length: int = 512
) -> Calibration:
    """Read `files` (none: the text that ships with qc) and cut them into at most `samples` windows.

    Fewer windows than samples are no error: the value says how many there were. Raises Refused for what
    `read_texts` and `windows` refuse.
    """
    if samples < 1:
        raise Refused(f"samples={samples}: calibration needs at least one window; choose samples >= 1")
    texts = read_texts(files) if files else [shipped_text()]
    every = windows(texts, tokenizer, samples=None, length=length)
    return Calibration(every[:samples].clone(), len(every), tuple(str(file) for file in files))


def windows(
    texts: Sequence[str], tokenizer: Tokenizer, *, samples: int | None = 32, length: int = 512
) -> Tensor:
    """Join the texts by a blank line, tokenize once, and cut into windows: [n, length] int64.

    The first `samples` windows are returned (None: all); a last, shorter piece is dropped. Raises Refused
    when the text has fewer tokens than one window.
    """
    if length < 2:
        raise Refused(f"length={length}: a window needs at least two tokens; choose length >= 2")
    ids = torch.tensor(tokenizer(SEPARATOR.join(texts), verbose=False)["input_ids"], dtype=torch.int64)
    count = len(ids) // length
    if count == 0:
        raise Refused(
            f"the text has {len(ids)} tokens, fewer than one window of {length}: "
            f"give more text, or choose length <= {len(ids)}"
        )
    return ids[: count * length].view(count, length)[:samples]


def read_texts(files: Iterable[str | Path]) -> list[str]:
    """The texts of all files, in the order given.

    ``.jsonl`` holds one text per line: an object with one of the keys `TEXT_KEYS`, a JSON string, or a raw
    line; ``.json`` a list of strings or of such objects; ``.txt`` one text. Blank lines are skipped. Raises
    Refused, naming file and line, for a missing or empty file, another suffix, broken JSON, and an object
    without text.
    """
    return [sample.text for sample in read_samples(files)]


@dataclass(frozen=True)
class Sample:
    """One text of a calibration file."""

    text: str
    item: dict[str, Any] | str
    """As it stands in the file: an object with more keys, or the text alone."""
    where: str
    """The file and the place in it."""

    @property
    def line(self) -> dict[str, Any]:
        """As an object, for a file that is written."""
        return self.item if isinstance(self.item, dict) else {"text": self.item}


def read_samples(files: Iterable[str | Path]) -> list[Sample]:
    """The texts of all files one by one, in the order given, with the objects that they stand in; see `read_texts`."""
    return [sample for file in files for sample in _read_file(Path(file))]


def shipped_text() -> str:
    """The calibration text that ships with qc."""
    return resources.files(__package__ or "qc.compiler").joinpath(SHIPPED).read_text(encoding="utf-8")


def _read_file(file: Path) -> list[Sample]:
    if file.suffix not in SUFFIXES:
        raise Refused(f"{file}: text is read from {', '.join(SUFFIXES)}, not '{file.suffix}'")
    try:
        content = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise Refused(f"{file}: no such file; give a text that exists") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise Refused(f"{file}: cannot be read: {error.strerror}") from None
    if file.suffix == ".txt":
        samples = [Sample(content, content, str(file))]
    elif file.suffix == ".json":
        samples = _json_samples(file, content)
    else:
        lines = enumerate(content.split("\n"), start=1)
        samples = [_line_sample(line, f"{file}, line {number}") for number, line in lines if line.strip()]
    if not any(sample.text.strip() for sample in samples):
        raise Refused(f"{file}: holds no text; give a file with text in it")
    return samples


def _json_samples(file: Path, content: str) -> list[Sample]:
    if not content.strip():
        return []
    items = _parse(content, str(file))
    if not isinstance(items, list):
        raise Refused(
            f"{file}: a .json file is a list of strings or objects, this is {_kind(items)}; "
            f"write one object per line and name it .jsonl, or wrap it in a list"
        )
    return [_item_sample(item, f"{file}, item {number}") for number, item in enumerate(items, start=1)]


def _line_sample(line: str, where: str) -> Sample:
    if line.lstrip().startswith("{"):
        return _item_sample(_parse(line, where), where)
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        value = None
    return _item_sample(value if isinstance(value, str) else line.rstrip("\r"), where)


def _item_sample(item: object, where: str) -> Sample:
    check_unicode(item, where)
    if isinstance(item, str):
        return Sample(item, item, where)
    if not isinstance(item, dict):
        raise Refused(f"{where}: expected a string or an object, this is {_kind(item)}")
    key = next((key for key in TEXT_KEYS if key in item), None)
    if key is None:
        raise Refused(
            f"{where}: no text under {', '.join(TEXT_KEYS)}; "
            f"the object has {', '.join(map(str, item)) or 'no keys'}: rename the key that holds the text"
        )
    if not isinstance(item[key], str):
        raise Refused(f"{where}: '{key}' must be a string, this is {_kind(item[key])}")
    return Sample(item[key], item, where)


def _parse(content: str, where: str) -> object:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = f", line {error.lineno}" if "\n" in content.strip() else ""
        raise Refused(f"{where}{place}: not readable as JSON: {error.msg} at column {error.colno}") from None


def check_unicode(value: object, where: str) -> None:
    """Refused for a value of JSON with half of a character in it (a lone surrogate), which no file can hold as text."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise Refused(
            f"{where}: half of a character ({half} without its other half); mend or take it out"
        ) from None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
