"""Description: of which type the tensors of a quantized checkpoint are, from the file or from config.json.

The ascendv1 layout has a file that names the type of every tensor. A checkpoint for transformers has no such file:
``quantization_config`` in its config.json names what is not float, and the rest follows from that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..runtime.formats import BESIDE
from ..runtime.linear import ROTATIONS
from .errors import Refused
from .numbered_names import folded, unfolded
from .shards import find_shards, read_json

DESCRIPTION = "quant_model_description.json"
FOR_MINDIE = "quant_model_description_"
"""How the description for MindIE begins; the type that names the model follows."""
METHOD = "qc"
"""``quant_method`` of a ``quantization_config`` of ours."""
FLOAT = "FLOAT"
FLOATS = (FLOAT, "W16A16S")
"""Types of tensors that are what they are in the float model; the second is of pruned ones."""
GRIDS = ("C8", "FAQuant")
"""Types of what belongs to no linear: grids of caches and attentions."""
IN_FLOAT = frozenset({"bias", *(leaf for kind in BESIDE.values() for leaf in kind.leaves)})
"""Tensors of an integer linear that are float all the same."""
TURNS = frozenset(name for names in ROTATIONS.values() for name in names)
"""Factors of online rotations, which have no type."""
GLOBAL = (
    "version", "model_quant_type", "group_size", "metadata", "optional", "kv_cache_type", "kv_quant_type",
    "fa_quant_type",
)  # fmt: skip
"""Keys of a description that are no tensors."""


def description_of(directory: Path) -> dict[str, Any] | None:
    """The description of a checkpoint: its file, or what config.json makes of the tensors; None of a float one.

    Raises:
        Refused: The file or config.json cannot be read, or there are several files and nobody says which counts.
    """
    if (directory / DESCRIPTION).is_file():
        return read_json(directory / DESCRIPTION)
    block = own_block(directory)
    return (
        description_for_mindie(directory)
        if block is None
        else described(block, find_shards(directory).entries)
    )


def description_for_mindie(directory: Path) -> dict[str, Any] | None:
    """The one description for MindIE in a directory, whatever type it is named after; None where there is none."""
    found = sorted(directory.glob(f"{FOR_MINDIE}*.json"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise Refused(f"there are {len(found)} ({names}), and nobody says which counts")
    return read_json(found[0]) if found else None


def own_block(directory: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` in a config.json, if it is one of ours."""
    return block_by(METHOD, directory)


def block_by(method: str, directory: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` in a config.json, if its ``quant_method`` is that one."""
    if not (directory / "config.json").is_file():
        return None
    block = read_json(directory / "config.json").get("quantization_config")
    return block if isinstance(block, dict) and block.get("quant_method") == method else None


def block_of(description: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The ``quantization_config`` that says what a description says.

    ``modules`` lists linears by their type and ``tensors`` what is stored of caches and attentions, with names
    folded over their numbers (``model.layers.{0..29}.mlp.down_proj``). ``dtype`` is that of the model for which
    the integer linears were made.
    """
    modules: dict[str, list[str]] = {}
    tensors: dict[str, list[str]] = {}
    for name, kind in description.items():
        if name in GLOBAL or not isinstance(kind, str) or kind == FLOAT:
            continue
        if kind in GRIDS or name.endswith(".quant_type"):
            tensors.setdefault(kind, []).append(name)
        elif name.endswith(".weight"):
            modules.setdefault(kind, []).append(name.removesuffix(".weight"))
    return {
        "quant_method": METHOD,
        "dtype": dtype,
        "modules": {kind: folded(names) for kind, names in modules.items()},
        "tensors": {kind: folded(names) for kind, names in tensors.items()},
    }


def described(block: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The inverse of ``block_of``, for the tensors ``names`` on disk.

    Raises:
        Refused: It is not made as ``block_of`` makes it.
    """
    modules, tensors = _listed(block, "modules"), _listed(block, "tensors")
    found: dict[str, Any] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        kind = modules.get(module)
        if name in tensors or (kind is not None and leaf in TURNS):
            continue
        found[name] = FLOAT if kind is None or leaf in IN_FLOAT else kind
    weights = {f"{module}.weight": kind for module, kind in modules.items()}
    return weights | found | tensors


def _listed(block: Mapping[str, Any], key: str) -> dict[str, str]:
    given = block.get(key) or {}
    if not isinstance(given, Mapping) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in given.values()
    ):
        raise Refused(f"quantization_config: {key} must map types to lists of names, as qc compile writes it")
    return {name: kind for kind, names in given.items() for pattern in names for name in unfolded(pattern)}
