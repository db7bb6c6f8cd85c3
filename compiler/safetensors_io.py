"""safetensors files: headers read by themselves, tensors read one at a time, shards written one tensor at a
time.

The format (github.com/huggingface/safetensors): eight bytes little-endian with the length of a JSON header,
the header (name to dtype, shape and byte range), the bytes of the tensors without holes. Reading is by
``pread`` and not by memory map: pages of a map stay counted to the process for as long as one tensor of the
file is alive.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .errors import Failed, Refused

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000
"""Longest header that readers of the format accept, in bytes."""
GIB = 2**30
_CHUNK = 2**30
"""Bytes given to one system call; Linux transfers at most 2 GiB at once."""


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before it exists."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class Entry(TensorSpec):
    """A tensor in a file."""

    start: int
    """Byte offset of the data from the beginning of the file."""


def read_header(path: Path) -> dict[str, Entry]:
    """Name to dtype, shape and place of every tensor of a file, in the order of the file.

    Raises:
        Refused: The file is truncated, or its header is not a safetensors header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise Refused(
                f"{path}: truncated shard: {size} bytes, the header alone needs {length + 8}; download it"
                " again"
            )
        if length > HEADER_LIMIT:
            raise Refused(f"{path}: not a safetensors file: its header would be {length} bytes long")
        raw = file.read(length)
    entries: dict[str, Entry] = {}
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        for name, item in header.items():
            begin, end = item["data_offsets"]
            if item["dtype"] not in DTYPES:
                raise ValueError(f"{name} has dtype {item['dtype']}, which is not supported")
            entry = Entry(DTYPES[item["dtype"]], tuple(item["shape"]), 8 + length + begin)
            if begin < 0 or entry.nbytes != end - begin:
                raise ValueError(f"{name} is {entry}, which is not {end - begin} bytes")
            entries[name] = entry
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path}: not a valid safetensors header: {error}; download it again") from error
    _check_extent(path, size, 8 + length, entries)
    return entries


def _check_extent(path: Path, size: int, start: int, entries: Mapping[str, Entry]) -> None:
    """Refuse a file whose tensors overlap, leave holes, or end elsewhere than the file does."""
    place = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != place:
            raise Refused(
                f"{path}: {name} begins at byte {entry.start}, not at {place}: the header is damaged"
            )
        place += entry.nbytes
    if size < place:
        raise Refused(
            f"{path}: truncated shard: {size} bytes, its header announces {place}; download it again"
        )
    if size > place:
        raise Refused(f"{path}: {size - place} bytes follow the last tensor: the shard is damaged")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} occurs twice")
    return result


def read_tensors(path: Path, entries: Mapping[str, Entry]) -> dict[str, torch.Tensor]:
    """Read tensors of one file into memory of their own; the file is open for this call only.

    Raises:
        Refused: The file is shorter than when its header was read.
    """
    result: dict[str, torch.Tensor] = {}
    with path.open("rb", buffering=0) as file:
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            view = _bytes(tensor)
            file.seek(entry.start)
            done = 0
            while done < entry.nbytes:
                count = file.readinto(view[done : done + _CHUNK])
                if not count:
                    raise Refused(
                        f"{path}: {name} ends after {done} of {entry.nbytes} bytes: truncated shard"
                    )
                done += count
            result[name] = tensor
    return {name: result[name] for name in entries}


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def plan_shards(specs: Mapping[str, TensorSpec], limit: int) -> tuple[tuple[str, ...], ...]:
    """Cut names, in order, into shards of at most ``limit`` bytes; a larger tensor has one of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, spec in specs.items():
        if not shards or (spec.nbytes > room and shards[-1]):
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= spec.nbytes
    return tuple(map(tuple, shards))


class ShardWriter:
    """Writes the shards of a checkpoint whose tensors are all announced, in whatever order they come.

    Every file gets its header first and then each tensor at its place: nothing is held in memory, and the
    bytes do not depend on the order of writing. The index is written at the end. Use it as a context manager:
    leaving it without an exception checks that every announced tensor was written.

    Args:
        directory: Where the files go; it exists.
        specs: Name to dtype and shape of every tensor, in the order in which shards are filled.
        stem: Files are named ``<stem>-0000i-of-0000N.safetensors`` and ``<stem>.safetensors.index.json``.
        part_file_size: Largest shard in GiB.

    Raises:
        Failed: A tensor is not announced, not as announced, written twice, or never.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, TensorSpec],
        stem: str = "quant_model_weights",
        part_file_size: float = 4,
    ) -> None:
        self.directory = directory
        self.stem = stem
        self.specs = {name: TensorSpec(spec.dtype, spec.shape) for name, spec in specs.items()}
        self._start: dict[str, int] = {}
        self._file: dict[str, Path] = {}
        self._missing = set(self.specs)
        shards = plan_shards(self.specs, int(part_file_size * GIB))
        for number, names in enumerate(shards, 1):
            self._begin(directory / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors", names)

    def _begin(self, path: Path, names: Iterable[str]) -> None:
        """Write the header of one shard and give the file its final size."""
        place = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        # wide dtypes first, so that every tensor is aligned to its own size
        for name in sorted(names, key=lambda name: -self.specs[name].dtype.itemsize):
            spec = self.specs[name]
            end = place + spec.nbytes
            header[name] = {
                "dtype": NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [place, end],
            }
            self._start[name], self._file[name] = place, path
            place = end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        with path.open("xb") as file:
            file.write(len(raw).to_bytes(8, "little"))
            file.write(raw)
            file.truncate(8 + len(raw) + place)
        for name in header.keys() - {"__metadata__"}:
            self._start[name] += 8 + len(raw)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor at its place."""
        spec = self.specs.get(name)
        if spec is None:
            raise Failed(f"{name} was not announced to the writer of {self.directory}")
        found = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if found != spec:
            raise Failed(f"{name} is {found}, but {spec} was announced in the header")
        if name not in self._missing:
            raise Failed(f"{name} is written twice")
        view = _bytes(tensor.detach().cpu().contiguous())
        with self._file[name].open("r+b", buffering=0) as file:
            file.seek(self._start[name])
            done = 0
            while done < len(view):
                done += file.write(view[done : done + _CHUNK]) or 0
        self._missing.remove(name)

    def close(self) -> None:
        """Check that nothing is missing, flush the files to disk and write the index."""
        if self._missing:
            first = ", ".join(sorted(self._missing)[:3])
            raise Failed(f"{len(self._missing)} announced tensors were never written, among them {first}")
        for path in sorted(set(self._file.values())):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in self.specs.values())},
            "weight_map": {name: self._file[name].name for name in self.specs},
        }
        text = json.dumps(index, indent=4, ensure_ascii=False)
        (self.directory / f"{self.stem}.safetensors.index.json").write_text(text + "\n", encoding="utf-8")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
