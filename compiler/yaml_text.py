"""YAML as a recipe needs it: values that know their line, and nothing that a file can do but hold values.

Tags that make objects, keys given twice, text that is not YAML, files too large, aliases that expand without end and
nesting without end are refused. Numbers are those of YAML 1.2, so that ``1e-5`` is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from .errors import Refused

LARGEST_FILE = 128 * 1024
"""Bytes."""
MOST_VALUES = 10_000
"""Values of a file with every alias written out."""
DEEPEST = 40
"""Mappings and lists inside each other."""

_TOO_MUCH = f"more than {MOST_VALUES} values or {DEEPEST} levels"
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_PLAIN: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
              r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
    ("merge", r"<<", "<"),
)  # fmt: skip
"""What plain text stands for, by the characters that it begins with; anything else is text.

``010``, ``0x10``, ``1:30`` and dates mean different things to different readers: they are text here, which no number
field takes.
"""

Scalar = str | int | float | bool | None


@dataclass(frozen=True, eq=False)
class Entry:
    """One value of a file: a scalar, a list (tuple) or a mapping of entries, and the line on which it stands."""

    value: Scalar | tuple[Entry, ...] | Mapping[str, Entry]
    line: int
    lines: Mapping[str, int]
    """Lines of the keys, for a mapping."""
    size: int = 1
    """Values in it, aliases written out."""
    depth: int = 0

    @property
    def kind(self) -> str:
        """What it is, in words: ``a list``, ``the number 3``."""
        value = self.value
        if isinstance(value, Mapping):
            return "a mapping"
        if isinstance(value, tuple):
            return "a list"
        if value is None:
            return "empty"
        if isinstance(value, str):
            return f"the text {value[:60]!r}"
        return f"{str(value).lower()}" if isinstance(value, bool) else f"the number {value}"


def read_yaml(path: str | Path) -> Entry:
    """The document of a file.

    Raises:
        Refused: The file cannot be read, is not one YAML document, or does what is refused here.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise Refused(f"{path}: this is a directory; give a recipe file")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise Refused(f"{path}: no such file; give a recipe that exists") from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > LARGEST_FILE:
        raise Refused(f"{path}: larger than {LARGEST_FILE // 1024} KiB; a recipe is a page of text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Entry:
    """The document of a text; ``name`` stands before the line in messages. Raises Refused as ``read_yaml``."""
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise Refused(f"{name}: empty; a recipe begins with apiversion: modelslim_v1")
        return _Reader(name).entry(root)
    except yaml.reader.ReaderError as error:
        raise Refused(f"{name}: not text: {error.reason} at character {error.position}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = ", ".join(filter(None, (error.context, error.problem)))
        raise Refused(f"{name}, line {mark.line + 1 if mark else '?'}: cannot be read: {why}") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """SafeLoader with numbers of YAML 1.2 and limits; only its nodes are used."""

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012
    depth = 0
    count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > DEEPEST or self.count > MOST_VALUES:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=_TOO_MUCH, problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _name, _text, _first in _PLAIN:
    _Loader.add_implicit_resolver(
        f"{_TAG}{_name}", re.compile(rf"^(?:{_text})$"), [c if c != "\0" else "" for c in _first]
    )


class _Reader:
    """From nodes to entries; an alias is the entry that it names, once more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._done: dict[yaml.Node, Entry] = {}
        self._open: set[yaml.Node] = set()

    def refuse(self, node: yaml.Node, why: str) -> Refused:
        return Refused(f"{self.name}, line {_line(node)}: {why}")

    def entry(self, node: yaml.Node) -> Entry:
        if node in self._done:
            return self._done[node]
        if node in self._open:
            raise self.refuse(node, "an alias inside of what it names: this has no end")
        self._open.add(node)
        if isinstance(node, yaml.MappingNode):
            made = self._mapping(node)
        elif isinstance(node, yaml.SequenceNode):
            made = self._list(node)
        else:
            assert isinstance(node, yaml.ScalarNode)
            made = Entry(self._scalar(node), _line(node), {})
        self._open.discard(node)
        if made.size > MOST_VALUES or made.depth > DEEPEST:
            raise self.refuse(node, f"{_TOO_MUCH} with its aliases written out")
        self._done[node] = made
        return made

    def _list(self, node: yaml.SequenceNode) -> Entry:
        self._tagged(node, "seq")
        return _sized(partial(Entry, tuple(self.entry(item) for item in node.value), _line(node), {}))

    def _mapping(self, node: yaml.MappingNode) -> Entry:
        self._tagged(node, "map")
        own: dict[str, Entry] = {}
        lines: dict[str, int] = {}
        merged: list[Entry] = []
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.refuse(key, "a key is a name, this is a list or a mapping")
            if key.value in lines:
                raise self.refuse(key, f"{key.value!r} is given twice, first on line {lines[key.value]}")
            lines[key.value] = _line(key)
            if key.tag == _MERGE:
                merged += self._merges(value)
            else:
                own[key.value] = self.entry(value)
        for other in merged:
            assert isinstance(other.value, Mapping)
            for name, value in other.value.items():
                if name not in own:
                    own[name], lines[name] = value, other.lines[name]
        return _sized(partial(Entry, own, _line(node), lines))

    def _merges(self, node: yaml.Node) -> list[Entry]:
        """The mappings that ``<<`` names: one, or a list of which earlier ones win."""
        entry = self.entry(node)
        found = list(entry.value) if isinstance(entry.value, tuple) else [entry]
        if not all(isinstance(one.value, Mapping) for one in found):
            raise self.refuse(node, "'<<' merges a mapping or a list of mappings")
        return found

    def _scalar(self, node: yaml.ScalarNode) -> Scalar:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if node.tag in (_MERGE, f"{_TAG}str"):
            return text
        plain = {f"{_TAG}{name}": pattern for name, pattern, _ in _PLAIN}
        if node.tag not in plain:
            raise self.refuse(node, f"the tag {node.tag!r} is not allowed: a recipe holds plain values")
        if not re.fullmatch(plain[node.tag], text):
            raise self.refuse(node, f"{text[:60]!r} is no {kind}")
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in ("yes", "true", "on")
        number = text.replace("_", "").lower()
        try:
            return (
                int(number) if kind == "int" else float(number.replace(".inf", "inf").replace(".nan", "nan"))
            )
        except ValueError:
            raise self.refuse(node, f"a number of {len(number)} digits is too long") from None

    def _tagged(self, node: yaml.Node, kind: str) -> None:
        if node.tag != f"{_TAG}{kind}":
            raise self.refuse(node, f"the tag {node.tag!r} is not allowed: a recipe holds plain values")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _sized(make: partial[Entry]) -> Entry:
    inside = list(_children(make.args[0]))
    return make(
        size=1 + sum(one.size for one in inside), depth=1 + max((one.depth for one in inside), default=0)
    )


def _children(value: Any) -> Iterator[Entry]:
    yield from value.values() if isinstance(value, Mapping) else value
