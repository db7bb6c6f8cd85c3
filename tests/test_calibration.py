"""Reading calibration files and cutting them into windows."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc.compiler.calibration import calibration, read_texts, shipped_text, windows, windows_of
from qc.compiler.errors import Refused


def byte_tokenizer(text: str, *, verbose: bool = True) -> dict[str, list[int]]:
    """One id per byte: what was joined, and in which order, can be read back from the ids."""
    return {"input_ids": list(text.encode())}


def test_texts_of_all_files_in_the_order_given(tmp_path: Path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one"}\n\n{"prompt": "two"}\n', encoding="utf-8")
    items = tmp_path / "b.json"
    items.write_text(json.dumps(["three", {"inputs_pretokenized": "four"}]), encoding="utf-8")
    whole = tmp_path / "c.txt"
    whole.write_text("five\n\nstill five", encoding="utf-8")
    assert read_texts([whole, lines, items]) == ["five\n\nstill five", "one", "two", "three", "four"]


def test_preference_of_keys(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    objects = [
        {"prompt": "p", "text": "t", "inputs_pretokenized": "i"},
        {"prompt": "p", "text": "t", "id": 3},
        {"prompt": "p"},
    ]
    file.write_text("\n".join(json.dumps(item) for item in objects), encoding="utf-8")
    assert read_texts([file]) == ["i", "t", "p"]


def test_lines_that_are_no_objects_are_texts(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeffplain words\r\n"a \\"string\\""\n42\n[1, 2]\nhalf\u2028line\n'.encode())
    assert read_texts([file]) == ["plain words", 'a "string"', "42", "[1, 2]", "half\u2028line"]


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=6),
    samples=st.integers(1, 5),
    length=st.integers(2, 9),
)
def test_windows_are_the_joined_text_cut_without_gaps(texts: list[str], samples: int, length: int):
    joined = "\n\n".join(texts).encode()
    if len(joined) < length:
        with pytest.raises(Refused, match=f"{len(joined)} tokens"):
            windows(texts, byte_tokenizer, samples=samples, length=length)
        return
    cut = windows(texts, byte_tokenizer, samples=samples, length=length)
    count = min(samples, len(joined) // length)
    assert cut.dtype == torch.int64
    assert cut.shape == (count, length)
    assert bytes(cut.flatten().tolist()) == joined[: count * length]


def test_tokenized_once():
    calls: list[str] = []

    def tokenizer(text: str, *, verbose: bool) -> dict[str, list[int]]:
        calls.append(text)
        return byte_tokenizer(text)

    windows(["ab", "cd"], tokenizer, length=3)
    assert calls == ["ab\n\ncd"]


def test_fewer_windows_than_samples_are_used_and_counted(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("x" * 25, encoding="utf-8")
    few = calibration([file], byte_tokenizer, samples=4, length=10)
    assert (few.tokens.shape, few.available) == ((2, 10), 2)
    assert calibration([file], byte_tokenizer, samples=1, length=10).available == 2
    assert str(few) == f"2 windows of 10 tokens from {file}"
    assert windows_of(1, 10) == "1 window of 10 tokens"


def test_digest_is_of_the_ids_used(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("abcdefgh", encoding="utf-8")
    expected = hashlib.sha256(struct.pack("<4q", *b"abcd")).hexdigest()
    assert calibration([file], byte_tokenizer, samples=1, length=4).digest == expected
    assert calibration([file], byte_tokenizer, samples=2, length=4).digest != expected


def test_the_shipped_text_is_used_when_no_file_is_given():
    shipped = calibration([], byte_tokenizer, samples=10_000, length=512)
    assert bytes(shipped.tokens[0].tolist()) == shipped_text().encode()[:512]
    assert shipped.available == len(shipped_text().encode()) // 512 > 20
    assert shipped.files == ()
    assert f"ships with qc ({shipped.available} windows)" in str(shipped)


def test_the_shipped_text_repeats_nothing():
    pieces = shipped_text().split("\n\n")
    assert len(set(pieces)) == len(pieces)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "holds no text"),
        ("empty.jsonl", "\n \n", "holds no text"),
        ("empty.json", "", "holds no text"),
        ("none.json", "[]", "holds no text"),
        ("blank.jsonl", '{"text": " "}', "holds no text"),
        ("cut.jsonl", '{"text": "a"}\n{"text": "b', r"cut\.jsonl, line 2: not readable as JSON"),
        ("cut.json", '["a",\n"b"', r"cut\.json, line 2: not readable as JSON"),
        ("keys.jsonl", '{"body": "a", "id": 1}', "the object has body, id"),
        ("keys.json", '["a", {}]', r"item 2: .*the object has no keys"),
        ("kind.jsonl", '{"text": null}', r"line 1: 'text' must be a string, this is null"),
        ("kind.json", '["a", 3]', r"item 2: expected a string or an object, this is a number"),
        ("object.json", '{"text": "a"}', "a .json file is a list"),
        ("words.csv", "a,b", r"\.jsonl, \.json, \.txt, not '\.csv'"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text"),
    ],
)
def test_refused_with_the_place_and_the_cause(tmp_path: Path, name: str, content: str | bytes, message: str):
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(Refused, match=message) as refusal:
        read_texts([file])
    assert str(file) in str(refusal.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path):
    with pytest.raises(Refused, match=r"absent\.txt: no such file"):
        read_texts([tmp_path / "absent.txt"])
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(Refused, match=r"folder\.txt: cannot be read"):
        read_texts([tmp_path / "folder.txt"])


def test_sizes_out_of_range_are_refused():
    with pytest.raises(Refused, match="samples=0"):
        calibration([], byte_tokenizer, samples=0)
    with pytest.raises(Refused, match="length=1"):
        calibration([], byte_tokenizer, length=1)
    with pytest.raises(Refused, match="choose length <= 5"):
        windows(["short"], byte_tokenizer, length=6)
