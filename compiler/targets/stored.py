"""What a directory of checkpoint files holds, read as a server reads it: defects and all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..config_dtype import config_dtype
from ..errors import Refused
from ..safetensors_io import Entry, read_header, read_tensors
from ..shards import find_shards, nothing, read_json
from .target import Finding

INDEX = "model.safetensors.index.json"
"""The only index that vLLM reads; of other names it knows nothing."""


@dataclass(frozen=True)
class Stored:
    """The tensors of a directory by their names on disk, and its JSON files."""

    directory: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    """Of a tensor that is there twice, the one that is read last."""
    file: Mapping[str, Path]
    findings: tuple[Finding, ...] = field(default=(), compare=False)
    """What is wrong with the files themselves (rule A2)."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        return read_tensors(self.file[name], {name: self.entries[name]})[name]

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the config names for floats."""
        return config_dtype(self.config)

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object beside the weights; None where there is no such file. Refused where it is none."""
        file = self.directory / name
        return read_json(file) if file.is_file() else None


def stored(directory: Path) -> Stored:
    """Read config and headers.

    Raises:
        Refused: No such directory, no config.json, no safetensors, a header that cannot be read.
    """
    if not directory.is_dir():
        raise Refused(f"{directory}: no such directory; give one that holds a checkpoint")
    if not (directory / "config.json").is_file():
        raise Refused(
            f"{directory}: no config.json, so this is no checkpoint; give the directory that holds one"
        )
    config = read_json(directory / "config.json")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise Refused(nothing(directory))
    found = list(_twice_or_ignored(directory, files))
    listed = _listed(directory)
    entries: dict[str, Entry] = {}
    file: dict[str, Path] = {}
    for path in files if listed is None else [path for path in files if path.name in listed]:
        for name, entry in read_header(path).items():
            if name in entries:
                found.append(Finding(
                    "ruins", "A2", name, f"it is in {file[name].name} and in {path.name}: the one read last wins"
                ))  # fmt: skip
            entries[name], file[name] = entry, path
    return Stored(directory, config, entries, file, tuple(found))


def read_by_name(directory: Path) -> Stored:
    """The same as transformers and qc read it: one file, or the shards of one index, by its name, and no other.

    Raises:
        Refused: As for ``stored``.
    """
    whole = stored(directory)
    try:
        shards = find_shards(directory)
    except Refused as error:
        why = str(error).removeprefix(f"{directory}: ")
        return replace(whole, findings=(Finding("refuses", "A2", directory.name, why),))
    others = sorted({path.name for path in directory.glob("*.safetensors")} - {p.name for p in shards.files})
    unread = (Finding("warns", "A2", name, "no tensor of it is read") for name in others)
    return Stored(directory, whole.config, shards.entries, shards.file, tuple(unread))


def without_block(files: Stored, rule: str, method: str) -> Finding:
    """What transformers makes of a directory whose config.json has no ``quantization_config`` of a method."""
    other = files.config.get("quantization_config")
    if other:
        given = other.get("quant_method") if isinstance(other, Mapping) else other
        why = f"its quantization_config is of {given!r}, and not of {method!r}"
        return Finding("refuses", rule, "config.json", why)
    why = f"it has no quantization_config of {method!r}: transformers reads everything as float"
    if all(entry.dtype.is_floating_point for entry in files.entries.values()):
        return Finding("warns", rule, "config.json", why)
    return Finding(
        "ruins", rule, "config.json", f"{why}, integers too, and only reports tensors that it does not know"
    )


def _listed(directory: Path) -> set[str] | None:
    """The files that the index names; None without an index. Refused where it is none."""
    if not (directory / INDEX).is_file():
        return None
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise Refused(f"{directory / INDEX}: weight_map must map tensor names to file names")
    return {str(name) for name in weight_map.values()}


def _twice_or_ignored(directory: Path, files: list[Path]) -> Iterator[Finding]:
    """What an index makes of the files: some are not there, others are not read."""
    listed = _listed(directory)
    if listed is not None:
        for name in sorted(listed - {path.name for path in files}):
            yield Finding("refuses", "A2", INDEX, f"it lists {name}, which is not there (FileNotFoundError)")
        for path in files:
            if path.name not in listed:
                yield Finding("warns", "A2", path.name, f"{INDEX} does not list it: no tensor of it is read")
    for index in sorted(directory.glob("*.safetensors.index.json")):
        if index.name != INDEX:
            yield from _stale(index)


def _stale(index: Path) -> Iterator[Finding]:
    """An index of another name that does not agree with the files; nobody reads it but other tools."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        yield Finding("warns", "A2", index.name, "it cannot be read; vLLM does not look at it")
        return
    for name in sorted(n for n in names if not (index.parent / str(n)).is_file()):
        yield Finding(
            "warns", "A2", index.name, f"it lists {name}, which is not there; vLLM does not look at it"
        )
