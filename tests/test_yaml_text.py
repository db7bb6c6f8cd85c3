"""YAML as recipes need it: values with lines, and refusals for all that a file may do besides."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qc.compiler.errors import Refused
from qc.compiler.yaml_text import DEEPEST, LARGEST_FILE, MOST_VALUES, Entry, parse, read_yaml


def plain(entry: Entry) -> Any:
    """The values alone."""
    if isinstance(entry.value, dict):
        return {key: plain(one) for key, one in entry.value.items()}
    return [plain(one) for one in entry.value] if isinstance(entry.value, tuple) else entry.value


def parsed(text: str) -> Any:
    return plain(parse(text, "it"))


def test_numbers_are_those_of_people() -> None:
    assert parsed("[1e-5, 1E3, .5, 1., -3, +4, 1_000, 0.9, -.5e+2, 0]") == [
        1e-5, 1000.0, 0.5, 1.0, -3, 4, 1000, 0.9, -50.0, 0,
    ]  # fmt: skip
    assert [type(one) for one in parsed("[1e5, 10, 1.0, '10', true]")] == [float, int, float, str, bool]
    assert parsed("[.inf, -.INF]") == [float("inf"), float("-inf")]
    assert parsed("[True, no, ON, ~, null, '', 'no', \"~\"]") == [
        True,
        False,
        True,
        None,
        None,
        "",
        "no",
        "~",
    ]


@pytest.mark.parametrize("text", ["010", "0x10", "1:30", "2020-01-01", "1e", "1-5", "e5", "1.2.3", "_1"])
def test_what_readers_take_for_different_things_is_text(text: str) -> None:
    assert parsed(text) == text


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(max_size=20).filter(lambda text: text.isprintable()),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abc<~ 1", max_size=4), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(values)
def test_what_is_written_is_read(value: Any) -> None:
    assert parsed(yaml.safe_dump(value, allow_unicode=True)) == value


@given(st.text("ab:&*-[]{}<>#!|'\"\n \t,?%@`1.", max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    said = "it"
    try:
        parse(text, "it")
    except Refused as refused:
        said = str(refused)
    assert said.startswith("it")


def test_anchors_and_merge_keys() -> None:
    text = """
a: &a {x: 1, y: 2}
b: &b {y: 3, z: 4}
one: {<<: *a, y: 5}
two: {y: 5, <<: *a}
three:
  <<: [*b, *a]
  w: *a
four: {"<<": 1}
"""
    found = parsed(text)
    assert found["one"] == found["two"] == {"x": 1, "y": 5}
    assert found["three"] == {"w": {"x": 1, "y": 2}, "x": 1, "y": 3, "z": 4}
    assert found["four"] == {"<<": 1}
    root = parse(text, "it").value
    assert isinstance(root, dict)
    assert (root["three"].line, dict(root["three"].lines)) == (7, {"<<": 7, "w": 8, "y": 3, "z": 3, "x": 2})


REFUSED = {
    "a: 1\nb: 2\na: 3": "it, line 3: 'a' is given twice, first on line 1",
    "a: {b: 1, c: 2, b: 1}": "it, line 1: 'b' is given twice",
    "a: {<<: {x: 1}, <<: {y: 1}}": "'<<' is given twice",
    "a: *b": "undefined alias",
    "a: &a 1\nb: &a 2": "it, line 2: cannot be read: found duplicate anchor",
    "a: &a [*a]": "it, line 1: an alias inside of what it names",
    "a: &a {b: *a}": "an alias inside of what it names",
    "a: !!python/object/apply:os.system [x]": "python/object/apply:os.system' is not allowed",
    "a: !mine x": "the tag '!mine' is not allowed",
    "a: !!binary aGk=": "is not allowed",
    "a: !!set {x}": "is not allowed",
    "a: !!int x": "'x' is no int",
    "[1]: 2": "it, line 1: a key is a name, this is a list or a mapping",
    "<<: 3": "'<<' merges a mapping or a list of mappings",
    "<<: [{a: 1}, 3]": "'<<' merges a mapping or a list of mappings",
    "a: [1": "it, line 1: cannot be read: while parsing a flow sequence",
    "a: 1\n\tb: 2": "it, line 2: cannot be read",
    "a: 1\n---\nb: 1": "it, line 2: cannot be read: expected a single document",
    "a: \x00": "it: not text: special characters are not allowed",
    "": "it: empty",
    "# nothing": "it: empty",
    "a: " + "9" * 5000: "a number of 5000 digits is too long",
    "[" * (DEEPEST + 1): f"more than {MOST_VALUES} values or {DEEPEST} levels",
    "- " * (DEEPEST + 1) + "x": f"more than {MOST_VALUES} values or {DEEPEST} levels",
    "[" + "x," * MOST_VALUES + "]": f"more than {MOST_VALUES} values",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(Refused) as refused:
        parse(text, "it")
    assert REFUSED[text] in str(refused.value)


@pytest.mark.parametrize("kind", ["list", "mapping", "merge", "chain"])
def test_aliases_that_expand_without_end_are_refused_at_once(kind: str) -> None:
    lines = ["a0: &a0 {x: 1}"]
    for n in range(1, 60):
        many = {
            "list": "[" + ", ".join([f"*a{n - 1}"] * 9) + "]",
            "mapping": "{" + ", ".join(f"k{i}: *a{n - 1}" for i in range(9)) + "}",
            "merge": "{<<: [" + ", ".join([f"*a{n - 1}"] * 9) + f"], k{n}: *a{n - 1}}}",
            "chain": f"[*a{n - 1}]",
        }
        lines.append(f"a{n}: &a{n} {many[kind]}")
    start = time.process_time()
    with pytest.raises(Refused, match="with its aliases written out"):
        parse("\n".join(lines), "it")
    assert time.process_time() - start < 5


def test_files_that_are_none(tmp_path: Path) -> None:
    cases: dict[str, bytes] = {
        "larger than 128 KiB": b"#" * (LARGEST_FILE + 1),
        "not UTF-8 text": b"a: \xff\xfe",
        "not text": b"\x7fELF\x00\x01",
        "empty": b"",
    }
    for words, content in cases.items():
        (tmp_path / "it").write_bytes(content)
        with pytest.raises(Refused, match=words):
            read_yaml(tmp_path / "it")
    for path, words in ((tmp_path, "this is a directory"), (tmp_path / "no", "no such file")):
        with pytest.raises(Refused, match=words):
            read_yaml(path)
    (tmp_path / "it").write_bytes("\ufeffa: é\r\nb: 2\r\n".encode())
    assert plain(read_yaml(tmp_path / "it")) == {"a": "é", "b": 2}
    if os.getuid():
        (tmp_path / "it").chmod(0)
        with pytest.raises(Refused, match="cannot be read: Permission denied"):
            read_yaml(tmp_path / "it")
