"""Verify an output: its files, tensors, values and certificates against what it says of itself (``qc verify``).

The checks are those of the compile, replayed on what is on disk. They read every byte and run no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..runtime.linear import IntegerLinear
from ..runtime.w4a8 import W4A8Dynamic, sums, unpack_pairs
from .certificate import LIMIT
from .compressed_library import NAME as COMPRESSED_TENSORS
from .description import DESCRIPTION, FLOAT, FLOATS, GLOBAL, GRIDS, TURNS, block_by, description_of
from .errors import Refused
from .export import MANIFEST
from .journal import FILE as JOURNAL
from .journal import quantized
from .load_modules import format_on_meta
from .safetensors_io import Entry, TensorSpec, read_header, read_tensors
from .shards import NUMPY, Shards, find_shards, read_json
from .targets.compressed_modules import modules_of_block
from .verify_files import Check, files_as_written, inputs_as_read

ORTHOGONAL = 0.05
"""How far the product of a rotation factor and its transpose may be from one; bfloat16 rounds to 0.004."""
CONDITION = 1e4
"""Largest condition number of a factor that a weight can have been folded by."""


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
    count, wrong = _values(path, modules, description, _learned(path))
    checks.append(Check("values", f"{count} numbers are finite and in range", tuple(wrong)))
    return (*checks, _certificates(path, manifest, modules))


def _linears(path: Path) -> tuple[Shards, dict[str, IntegerLinear], Mapping[str, Any], list[str]]:
    """The tensors, the integer linears that they make, their types where a description has them, and what is wrong."""
    shards = find_shards(path)
    dtype = _dtype(read_json(path / "config.json")) if (path / "config.json").is_file() else None
    block = block_by(COMPRESSED_TENSORS, path)
    if block is not None:
        modules, wrong = modules_of_block(shards, block, dtype or torch.bfloat16)
        return shards, modules, {}, wrong + misfits(modules, shards)
    description = description_of(path)
    if description is None:
        raise Refused(f"{path}: neither {DESCRIPTION} nor a quantization_config says what its tensors are")
    modules, wrong = modules_of(shards, description, dtype)
    return shards, modules, description, wrong


def _dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else None


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


def _values(
    path: Path, modules: Mapping[str, IntegerLinear], description: Mapping[str, Any], learned: bool
) -> tuple[int, list[str]]:
    """Read every tensor once, and look whether its numbers can be what they stand for.

    Online transforms are orthogonal, unless some of them are ``learned``: then they can be inverted.
    """
    count, wrong = 0, list[str]()
    halves: dict[str, dict[str, Tensor]] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in _each(file):
            prefix, _, leaf = name.rpartition(".")
            count += tensor.numel()
            if description.get(name) in GRIDS:
                reason = _positive(tensor) if leaf.endswith("scale") else _finite(tensor)
            else:
                module = modules.get(prefix)
                ask = VALUES.get(leaf) if module is not None else None
                ask = _invertible if ask is _rotation and learned else ask
                reason = ask(tensor, module) if ask and module is not None else _finite(tensor)
                if module is not None and module.beside is not None:
                    reason = reason or module.beside.wrong(leaf, tensor, module.in_features)
            if reason:
                wrong.append(f"{name}: {reason}")
            if isinstance(modules.get(prefix), W4A8Dynamic):
                held = halves.setdefault(prefix, {})
                held[leaf] = tensor
                if {"weight", "weight_scale", "scale_bias"} <= held.keys():
                    wrong += _sums(prefix, **halves.pop(prefix))
    return count, wrong


def _learned(path: Path) -> bool:
    """Whether the journal tells of learned transforms (in names of the model, which differ from those on disk)."""
    try:
        lines = (path / JOURNAL).read_text(encoding="utf-8").splitlines()
        edits = [edit.split() for line in lines for edit in json.loads(line).get("edits", ())]
    except (OSError, ValueError, AttributeError):
        return False  # told of by the check of the certificates
    return any(words[:1] == ["wrap"] and "learned" in words for words in edits)


def _sums(prefix: str, weight: Tensor, weight_scale: Tensor, scale_bias: Tensor, **rest: Tensor) -> list[str]:
    """Whether what the server takes off again, for nibbles without a sign, is what its weight makes of them."""
    wanted = sums(unpack_pairs(weight), weight_scale, scale_bias.shape[1])
    if torch.allclose(scale_bias, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max())):
        return []
    return [f"{prefix}.scale_bias: it is not eight times the sums of the weight"]


def _each(file: Path) -> Iterator[tuple[str, Tensor]]:
    entries: dict[str, Entry] = read_header(file)
    for name, entry in entries.items():
        yield name, read_tensors(file, {name: entry})[name]


def _finite(tensor: Tensor, module: IntegerLinear | None = None) -> str:
    if not tensor.is_floating_point():
        return ""
    bad = int((~torch.isfinite(tensor)).sum())
    return f"{bad} of {tensor.numel()} numbers are not finite" if bad else ""


def _integers(tensor: Tensor, module: IntegerLinear) -> str:
    if module.packed:
        return ""  # two integers in a byte: every byte is two of them
    low, high = -(2 ** (module.weight_bits - 1)), 2 ** (module.weight_bits - 1) - 1
    least, most = int(tensor.min()), int(tensor.max())
    if low <= least and most <= high:
        return ""
    return f"integers from {least} to {most}, {module.type} holds {low} to {high}"


def _positive(tensor: Tensor, module: IntegerLinear | None = None) -> str:
    if tensor.dtype == torch.int64:  # the bits of float32 numbers, for float16 models
        tensor = tensor.to(torch.int32).view(torch.float32)
    bad = int((~(tensor > 0) | ~torch.isfinite(tensor)).sum())
    return f"{bad} of {tensor.numel()} scales are not positive numbers" if bad else ""


def _offset(tensor: Tensor, module: IntegerLinear) -> str:
    if module.offsets:  # what is stored is added
        return "" if torch.equal(tensor, tensor.round()) else "offsets of weights are whole numbers"
    return "" if not tensor.any() else "weights are symmetric, their offsets are zero"


def _rotation(tensor: Tensor, module: IntegerLinear) -> str:
    if reason := _finite(tensor):
        return reason
    wide = tensor.double()
    error = float((wide @ wide.T - torch.eye(len(wide), dtype=torch.float64)).abs().max())
    return "" if error <= ORTHOGONAL else f"not orthogonal: off by {error:.2g}, more than rounding does"


def _invertible(tensor: Tensor, module: IntegerLinear) -> str:
    if reason := _finite(tensor):
        return reason
    condition = float(torch.linalg.cond(tensor.double()))
    return (
        "" if condition <= CONDITION else f"can hardly be inverted: its condition number is {condition:.2g}"
    )


def _ratio(tensor: Tensor, module: IntegerLinear) -> str:
    return "" if bool(((tensor > 0) & (tensor <= 1)).all()) else "a clip ratio is above 0 and at most 1"


VALUES: Mapping[str, Callable[[Tensor, IntegerLinear], str]] = {
    "weight": _integers, "weight_scale": _positive, "weight_offset": _offset, "input_scale": _positive,
    "deq_scale": _positive, "heads_rotation": _rotation, "kronecker_rotation_m": _rotation,
    "kronecker_rotation_n": _rotation, "left_trans": _rotation, "right_trans": _rotation, "clip_ratio": _ratio,
}  # fmt: skip
"""What is asked of the values of each tensor of an integer linear."""


def _certificates(
    path: Path, manifest: Mapping[str, Any], modules: Mapping[str, IntegerLinear] | None
) -> Check:
    """Every rewrite of the plan is in the journal, and every one that claims to keep the function has its proof."""
    try:
        lines = (path / JOURNAL).read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return Check("certificates", "", (f"{JOURNAL} cannot be read: {error}",))
    if not all(isinstance(entry, dict) for entry in entries):
        return Check("certificates", "", (f"{JOURNAL} cannot be read: a line that is no object",))
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
    planned: Mapping[str, int] = manifest.get("rewrites") or {}
    for name in planned.keys() | done.keys():
        want, got = planned.get(name, 0), len(done.get(name, ()))
        if want != got:
            wrong.append(f"{name}: the plan has {want} rewrites, the journal {got}")
    swapped = sum(len(quantized(entry)) for entry in entries)
    if modules is not None and swapped != len(modules):
        wrong.append(f"{len(modules)} linears are integers, the journal tells of {swapped}")
    math_, stored = (
        max((float(p.get(k, math.nan)) for p in proofs), default=0.0) for k in ("math", "stored")
    )
    return Check(
        "certificates",
        f"{sum(planned.values())} rewrites as planned, {len(proofs)} proofs, largest error {math_:.1e} (float64, limit "
        f"{LIMIT:g}), {stored:.1e} as stored",
        tuple(sorted(wrong)),
    )  # fmt: skip


def _proved(proof: Mapping[str, Any]) -> bool:
    found, rows = proof.get("math"), proof.get("rows")
    return isinstance(found, float) and 0 <= found < LIMIT and isinstance(rows, int) and rows > 0
