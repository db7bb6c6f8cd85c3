"""Which files of a checkpoint directory hold which tensors: headers only, nothing outside the directory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import Refused
from .safetensors_io import Entry, read_header

STEMS = ("model", "quant_model_weights")
"""How weight files begin: as transformers writes them, and in the ascendv1 layout."""
MINDIE = "quant_model_weight_"
"""How those for MindIE begin; the type that names the model follows."""
NUMPY = "quant_weight.npy"
"""The integers as ``--target numpy`` writes them."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")


@dataclass(frozen=True)
class Shards:
    """The tensors of a checkpoint by their names on disk, each with its file and place."""

    directory: Path
    files: tuple[Path, ...]
    """Every file that was read: the shards, and the index if there is one."""
    entries: Mapping[str, Entry]
    file: Mapping[str, Path]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        Refused: It cannot be read, is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise Refused(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def inside(directory: Path, path: Path) -> bool:
    """Whether a path, links followed, is inside a directory.

    The cache of the Hugging Face hub is the one layout that links out of it: ``snapshots/<revision>`` holds
    links to ``../../blobs``, which belongs to the same repository.
    """
    root, real = directory.resolve(), path.resolve()
    roots = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent / "blobs")
    return any(real.is_relative_to(allowed) for allowed in roots)


def find_shards(directory: Path) -> Shards:
    """Read the headers of all weight files of a checkpoint directory.

    Raises:
        Refused: No safetensors there, a shard that is missing, damaged or outside the directory, an index
            that does not agree with the shards, a tensor that two shards hold.
    """
    found = weights_file(directory)
    if found is None:
        raise Refused(nothing(directory))
    return _indexed(directory, found) if found.suffix == ".json" else _read(directory, (found,), ())


def weights_file(directory: Path) -> Path | None:
    """The file with all weights of a directory, or the index of its shards; None where there is neither."""
    named = sorted(file.name for file in directory.glob(f"{MINDIE}*") if not _SHARD.search(file.name))
    stems = (*STEMS, *(name.partition(".safetensors")[0] for name in named))
    for stem in stems:
        for file in (directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"):
            if file.is_file():
                return file
    return None


def _indexed(directory: Path, index: Path) -> Shards:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise Refused(f"{index}: weight_map must map tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise Refused(
                f"{index}: {name!r} points outside the checkpoint directory; only files inside are read"
            )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise Refused(
            f"{directory}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}"
            "; complete the download"
        )
    shards = _read(directory, tuple(directory / name for name in names), (index,))
    for tensor, name in weight_map.items():
        if shards.file.get(tensor) != directory / name:
            raise Refused(
                f"{index}: {tensor} should be in {name}, which does not hold it; the index is stale:"
                " download the checkpoint again"
            )
    return shards


def _read(directory: Path, paths: tuple[Path, ...], others: tuple[Path, ...]) -> Shards:
    entries: dict[str, Entry] = {}
    file: dict[str, Path] = {}
    for path in paths:
        if not inside(directory, path):
            raise Refused(
                f"{path} is a link to {path.resolve()}, outside the checkpoint directory; only files inside"
                " are read: copy it there, or name the directory where it is"
            )
        for name, entry in read_header(path).items():
            if name in entries:
                raise Refused(f"{name} is in {file[name].name} and in {path.name} of {directory}")
            entries[name], file[name] = entry, path
    return Shards(directory, (*others, *paths), entries, file)


def nothing(directory: Path) -> str:
    """Why no weights can be read in a directory, and what to do."""
    pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
    if pickles:
        return (
            f"{directory}: the weights are pickles ({pickles[0]}), which can run code when they are loaded;"
            " qc reads safetensors only. If you trust the file, convert it once with transformers:"
            " AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(DESTINATION)"
        )
    packed = sorted(p.name for p in directory.glob("*.gguf"))
    if packed:
        return f"{directory}: {packed[0]} is GGUF, which qc does not read; give the float checkpoint in safetensors"
    if (directory / NUMPY).is_file():
        return (
            f"{directory}: its weights are dictionaries in .npy files (--target numpy), which are pickles and can run"
            " code when they are loaded: qc writes them and never reads them. Compile for --target modelslim or"
            " transformers too, and load, measure and verify that: the integers are the same"
        )
    found = sorted(p.name for p in directory.glob("*.safetensors"))
    hint = f"; {found[0]} is there, rename it if it is the whole model" if found else ""
    return f"{directory}: no weights: neither {STEMS[0]}.safetensors nor its sharded form with an index{hint}"
