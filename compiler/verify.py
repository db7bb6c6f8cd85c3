"""Verify an output: its files, tensors, values and certificates against what it says of itself (``qc verify``).

The checks are those of the compile, replayed on what is on disk. They read every byte and run no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ..runtime.linear import IntegerLinear
from .certificate import LIMIT
from .compressed_library import NAME as COMPRESSED_TENSORS
from .config_dtype import config_dtype
from .description import DESCRIPTION, FLOAT, FLOATS, GLOBAL, GRIDS, TURNS, block_by, description_of
from .errors import Refused
from .export import MANIFEST
from .journal import FILE as JOURNAL
from .journal import quantized
from .load_modules import format_on_meta
from .safetensors_io import Entry, TensorSpec
from .shards import NUMPY, Shards, find_shards, read_json
from .targets.compressed_modules import modules_of_block
from .verify_files import Check, files_as_written, inputs_as_read
from .verify_values import values_of


def verify(path: str | Path, model: str | Path | None = None) -> tuple[Check, ...]:
    """Check a directory that ``qc compile`` wrote.

    Args:
        path: The directory.
        model: The checkpoint directory from which it was compiled: its files are compared with the digests in
            the manifest too.

    Raises:
        Refused: One of them is no directory, or nothing is there that qc wrote.
    """
    path = Path(path)
    if not path.is_dir():
        raise Refused(f"{path}: no such directory; give the directory that qc compile wrote")
    if not (path / MANIFEST).is_file():
        raise Refused(f"{path}: no {MANIFEST}, so this is not what qc compile writes")
    manifest = read_json(path / MANIFEST)
    checks = [files_as_written(path, manifest)]
    if model is not None:
        if not Path(model).is_dir():
            raise Refused(
                f"--model {model}: no such directory; give the checkpoint that {path} was made from"
            )
        checks.append(inputs_as_read(Path(model), manifest))
    if (path / NUMPY).is_file():
        unread = Check("tensors", "not looked at: .npy dictionaries are pickles, which qc never reads", ())
        return (*checks, unread, _certificates(path, manifest, None))
    try:
        shards, modules, description, wrong = _linears(path)
    except Refused as error:
        return (*checks, Check("tensors", "", (str(error),)))
    checks.append(
        Check(
            "tensors",
            f"{len(shards.entries)}, those of {len(modules)} integer linears among them",
            tuple(wrong),
        )
    )
    count, wrong = values_of(path, modules, description, _learned(path))
    checks.append(Check("values", f"{count} numbers are finite and in range", tuple(wrong)))
    return (*checks, _certificates(path, manifest, modules))


def _linears(path: Path) -> tuple[Shards, dict[str, IntegerLinear], Mapping[str, Any], list[str]]:
    """The tensors, the integer linears that they make, their types where a description has them, and what is wrong."""
    shards = find_shards(path)
    dtype = config_dtype(read_json(path / "config.json")) if (path / "config.json").is_file() else None
    block = block_by(COMPRESSED_TENSORS, path)
    if block is not None:
        modules, wrong = modules_of_block(shards, block, dtype or torch.bfloat16)
        return shards, modules, {}, wrong + misfits(modules, shards)
    description = description_of(path)
    if description is None:
        raise Refused(f"{path}: neither {DESCRIPTION} nor a quantization_config says what its tensors are")
    modules, wrong = modules_of(shards, description, dtype)
    return shards, modules, description, wrong


class Headers(Protocol):
    """Whatever knows the headers of the tensors of a directory."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Name on disk to dtype, shape and place."""
        ...


def modules_of(
    shards: Headers, description: Mapping[str, Any], dtype: torch.dtype | None, *, exact: bool = True
) -> tuple[dict[str, IntegerLinear], list[str]]:
    """The integer linears by their prefix, on meta, and what of the tensors does not fit the description.

    ``exact`` False lets scales, offsets and biases have other dtypes than those that qc writes, as other tools do.
    """
    types = {
        name: kind
        for name, kind in description.items()
        if name not in GLOBAL and not name.endswith(".quant_type")
    }
    wrong = [f"{name} has a type but is in no file" for name in types if name not in shards.entries]
    wrong += [
        f"{name} is in a file but has no type in {DESCRIPTION}"
        for name in shards.entries
        if name not in types and name.rpartition(".")[2] not in TURNS
    ]
    modules: dict[str, IntegerLinear] = {}
    for name, kind in types.items():
        prefix, _, leaf = name.rpartition(".")
        if kind in FLOATS or leaf != "weight" or name not in shards.entries:
            continue
        try:
            modules[prefix] = format_on_meta(kind, prefix, shards.entries, dtype or torch.bfloat16, prefix)
        except Refused as error:
            wrong.append(str(error))
    owned = {f"{prefix}.{leaf}": prefix for prefix, module in modules.items() for leaf in module.state_dict()}
    for name, kind in types.items():
        if name.rpartition(".")[2] in TURNS:
            wrong.append(f"{name} has a type, and factors of online rotations have none")
            continue
        owner = owned.get(name)
        if owner is None and kind in (*GRIDS, *FLOATS):
            continue
        floats = ("bias", *(modules[owner].float_tensors() if owner is not None else ()))
        want = FLOAT if owner is None or name.rpartition(".")[2] in floats else modules[owner].stored_type
        if kind not in (want, FLOAT if name.endswith(".bias") else want):
            wrong.append(f"{name} has the type {kind}, its linear is {want}")
    return modules, wrong + misfits(modules, shards, exact=exact)


def misfits(modules: Mapping[str, IntegerLinear], shards: Headers, *, exact: bool = True) -> list[str]:
    """Tensors of integer linears that are missing, or of another dtype or shape; ``exact`` as for ``modules_of``."""
    wrong: list[str] = []
    for prefix, module in modules.items():
        for leaf, tensor in module.state_dict().items():
            want, entry = (
                TensorSpec(tensor.dtype, tuple(tensor.shape)),
                shards.entries.get(f"{prefix}.{leaf}"),
            )
            if entry is None:
                wrong.append(f"{prefix}.{leaf} is missing, {module.type} needs it")
            elif entry.shape != want.shape or (entry.dtype != want.dtype and (exact or leaf == "weight")):
                wrong.append(
                    f"{prefix}.{leaf} is {TensorSpec(entry.dtype, entry.shape)}, {module.type} needs {want}"
                )
    return wrong


def _learned(path: Path) -> bool:
    """Whether the journal tells of learned transforms (in names of the model, which differ from those on disk)."""
    try:
        lines = (path / JOURNAL).read_text(encoding="utf-8").splitlines()
        edits = [edit.split() for line in lines for edit in json.loads(line).get("edits", ())]
    except (OSError, ValueError, AttributeError, TypeError):
        return False  # told of by the check of the certificates
    return any(words[:1] == ["wrap"] and "learned" in words for words in edits)


def _certificates(
    path: Path, manifest: Mapping[str, Any], modules: Mapping[str, IntegerLinear] | None
) -> Check:
    """Every rewrite of the plan is in the journal, and every one that claims to keep the function has its proof."""
    try:
        lines = (path / JOURNAL).read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return Check("certificates", "", (f"{JOURNAL} cannot be read: {error}",))
    odd = next((number for number, entry in enumerate(entries, 1) if not _is_entry(entry)), None)
    if odd is not None:
        return Check("certificates", "", (f"{JOURNAL} cannot be read: line {odd} is none of qc compile",))
    wrong: list[str] = []
    done: dict[str, set[str]] = {}
    proofs: list[Mapping[str, Any]] = []
    for number, entry in enumerate(entries, 1):
        if "pass" not in entry:
            continue
        where = f"{JOURNAL}:{number}: {entry['pass']} at {entry.get('where')} in {entry.get('part')}"
        done.setdefault(entry["pass"], set()).add(str(entry.get("where")))
        if entry.get("claim") != "EXACT":
            continue
        proof = entry.get("certificate")
        proof = proof if isinstance(proof, dict) else {}
        proofs.append(proof)
        if not _proved(proof):
            wrong.append(
                f"{where}: claims to keep the function and has no proof of it (error {proof.get('math')})"
            )
    planned = manifest.get("rewrites") or {}
    if not isinstance(planned, dict) or not all(isinstance(count, int) for count in planned.values()):
        return Check("certificates", "", (f"{MANIFEST} does not say how many rewrites each pass makes",))
    for name in planned.keys() | done.keys():
        want, got = planned.get(name, 0), len(done.get(name, ()))
        if want != got:
            wrong.append(f"{name}: the plan has {want} rewrites, the journal {got}")
    swapped = sum(len(quantized(entry)) for entry in entries)
    if modules is not None and swapped != len(modules):
        wrong.append(f"{len(modules)} linears are integers, the journal tells of {swapped}")
    math_, stored = (max((_number(p.get(k)) for p in proofs), default=0.0) for k in ("math", "stored"))
    return Check(
        "certificates",
        f"{sum(planned.values())} rewrites as planned, {len(proofs)} proofs, largest error {math_:.1e} (float64, limit "
        f"{LIMIT:g}), {stored:.1e} as stored",
        tuple(sorted(wrong)),
    )  # fmt: skip


def _is_entry(value: Any) -> bool:
    """Whether a line of the journal can be read as one: an object, with a name of its pass and words of its edits."""
    if not isinstance(value, dict) or not isinstance(value.get("pass", ""), str):
        return False
    edits = value.get("edits", [])
    return isinstance(edits, list) and all(isinstance(e, str) and len(e.split()) > 1 for e in edits)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _proved(proof: Mapping[str, Any]) -> bool:
    found, rows = proof.get("math"), proof.get("rows")
    return isinstance(found, float) and 0 <= found < LIMIT and isinstance(rows, int) and rows > 0
