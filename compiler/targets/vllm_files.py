"""What vllm-ascend does with a directory of files: rules A1 to A15, on headers first and on numbers where they decide.

The rules follow the server: its description parsing, its registry, the parameters that its classes make, and the
loader of vLLM, which casts in silence, leaves what is missing as memory was, and skips biases that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..capture_sizes import Sizes, sizes_of
from ..errors import Refused
from .ascendv1 import DESCRIPTION, VERSION
from .releases import Release
from .stored import Stored, stored
from .target import Finding
from .vllm_layers import FLOAT, Served, served
from .vllm_ranks import ranks
from .vllm_tensors import tensors
from .vllm_values import grids, sizes_of_ops, values

HALF = (torch.bfloat16, torch.float16)


def judged(
    release: Release, directory: Path, *, tp: int = 1, deep: bool = True, trust_remote_code: bool = False
) -> tuple[Finding, ...]:
    """Everything that a release of the server does not take as it was meant; see ``Target.judge``."""
    files = stored(directory)
    found = list(files.findings)
    described, told = _described(files)
    found += told
    if files.dtype not in HALF:
        shown = str(files.dtype or files.config.get("dtype") or files.config.get("torch_dtype"))
        found.append(
            Finding("refuses", "A1", "config.json", f"the dtype {shown} is neither bfloat16 nor float16")
        )
    for part, where in ((files.config, ""), (files.config.get("text_config"), "text_config.")):
        if isinstance(part, Mapping) and part.get("quantization_config"):
            found.append(Finding(
                "refuses", "A1", "config.json",
                f"it has {where}quantization_config, which stands for the description: {DESCRIPTION} is never read"
                " (KeyError at the first layer)",
            ))  # fmt: skip
    if described is None:
        return tuple(found)
    sizes = sizes_of(directory, trust_remote_code)
    names = {disk: sizes.name_of(disk) for disk in files.entries}
    types = {
        sizes.name_of(key): kind
        for key, kind in described.items()
        if key.endswith(".weight") and isinstance(kind, str)
    }
    group = described.get("group_size", 256 if release.grouped_w4a8 else 0)
    server = served(
        sizes, types, group if isinstance(group, int) else 0, release,
        files.dtype if files.dtype in HALF else torch.bfloat16, tp,
    )  # fmt: skip
    found += server.findings
    found += _tables(sizes, types, release)
    found += tensors(files, sizes, server, names, described)
    found += values(files, server, names, deep)
    found += sizes_of_ops(sizes, server)
    found += ranks(files, sizes, server, tp)
    found += grids(files, sizes, release, names, described)
    found += _keys(files, described, server)
    found += _entries(files, described)
    return tuple(found)


def _described(files: Stored) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The description (rule A1); of a float checkpoint without one, that everything is float."""
    try:
        described = files.json(DESCRIPTION)
    except Refused as error:
        return None, [Finding("refuses", "A1", DESCRIPTION, str(error).partition(": ")[2])]
    if described is None:
        if any(entry.dtype == torch.int8 for entry in files.entries.values()):
            return None, [
                Finding(
                    "refuses", "A1", DESCRIPTION, "it is not there (ModelSlim Quantization Config Not Found)"
                )
            ]
        note = "it is not there: the server runs a float model, without --quantization ascend"
        return dict.fromkeys(files.entries, FLOAT), [Finding("warns", "A1", DESCRIPTION, note)]
    odd = [key for key, value in described.items() if not isinstance(value, str | int | float | dict | list)]
    return described, [Finding("warns", "A1", DESCRIPTION, f"{key} is no type") for key in odd]


def _tables(sizes: Sizes, types: Mapping[str, str], release: Release) -> Iterator[Finding]:
    """A3 for embeddings: they are float, and before 0.23 their entry has to say so."""
    for name in sorted(sizes.embeddings):
        kind = types.get(f"{name}.weight")
        if not name.endswith(("embed_tokens", "wte", "embed_in", "word_embeddings")):
            continue
        if kind is None and not release.float_embedding:
            yield Finding("refuses", "A3", f"{name}.weight", "the description has no entry for it (KeyError)")
        elif kind not in (None, FLOAT):
            yield Finding(
                "refuses", "A3", f"{name}.weight", f"it is {kind}, and embeddings are served in float alone"
            )


def _keys(files: Stored, described: Mapping[str, Any], server: Served) -> Iterator[Finding]:
    """A13: keys that speak of the whole model."""
    packed = [name for name, kind in server.kinds.items() if kind == "W4A8_DYNAMIC"]
    if packed and described.get("version") != VERSION:
        why = f"version is {described.get('version')!r}: W4A8 weights are two int4 to a byte with {VERSION!r} alone"
        yield Finding("refuses", "A13", DESCRIPTION, why)
    optional = described.get("optional")
    for path in _paths(optional if isinstance(optional, Mapping) else {}):
        if not (files.directory / path).is_file():
            yield Finding("warns", "A13", DESCRIPTION, f"optional names {path}, which is not there")


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _paths(one)
    elif isinstance(value, str) and value.endswith(".safetensors"):
        yield value


def _entries(files: Stored, described: Mapping[str, Any]) -> Iterator[Finding]:
    """A15: weights without a type and types without a tensor; the server looks at neither."""
    for name in files.entries:
        if name.endswith(".weight") and name not in described:
            yield Finding("warns", "A15", name, "the description has no entry for it")
    for name in described:
        if name.endswith(".weight") and name not in files.entries:
            yield Finding("warns", "A15", name, "it has a type and is in no file")
