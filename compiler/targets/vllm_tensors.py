"""What vllm-ascend does with every tensor of a directory: where it goes, what is left without (A5 to A8, A12)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..capture_sizes import Sizes
from ..safetensors_io import TensorSpec
from .stored import Stored
from .target import Finding
from .vllm_layers import Served
from .vllm_parameters import Parameter

CACHE = re.compile(r"(?P<attention>.*)\.[kv]_proj\.kv_cache_(scale|offset)")
ATTENTION = re.compile(r"(?P<attention>.*)\.fa_[qkv]\.(scale|offset)")
SKIPPED = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    ".masked_bias",
    ".attn.bias",
)
"""Endings of tensors that vLLM passes over, and that no model needs."""
LOSS = 1e-2
"""Relative error from which a cast is one that changes a model."""


def tensors(
    files: Stored, sizes: Sizes, server: Served, names: Mapping[str, str], described: Mapping[str, object]
) -> Iterator[Finding]:
    """Every tensor on disk, then every parameter that none of them fills.

    Args:
        files: The directory.
        sizes: The model.
        server: The layers that the server makes.
        names: Name on disk to name in the model.
        described: The description.
    """
    filled: set[str] = set()
    norm_biases = any("norm.bias" in str(key) for key in described)
    for disk, entry in files.entries.items():
        name = names[disk]
        module, _, leaf = name.rpartition(".")
        if name in sizes.ties or (sizes.head and module == sizes.head and f"{module}.weight" in sizes.ties):
            yield from _tied(files, sizes, disk, name, names)
        elif CACHE.fullmatch(name) or ATTENTION.fullmatch(name) or name.endswith(SKIPPED):
            continue  # caches have rules of their own
        elif module in server.refused:
            continue
        elif module in server.parameters:
            parameter = server.parameters[module].get(leaf)
            filled.add(name)
            if parameter is None:
                yield _unknown(files, disk, leaf, f"its linear is {server.kinds[module]}")
            else:
                yield from fits(files, disk, entry, parameter)
        elif name in sizes.floats:
            filled.add(name)
            own = entry.dtype if files.dtype is None else files.dtype
            yield from fits(files, disk, entry, Parameter(own, sizes.floats[name]))
        elif leaf == "bias" and module.endswith("norm") and f"{module}.weight" in sizes.floats:
            if not norm_biases:
                why = "the description has no key with 'norm.bias', so norms get no bias: it is skipped without a word"
                yield Finding("ruins", "A12", disk, why)
        else:
            yield _unknown(files, disk, leaf, "the model has no such place")
    yield from _unfilled(sizes, server, filled)
    yield from _disagreeing(files, server, {name: disk for disk, name in names.items()})


def fits(files: Stored, disk: str, entry: TensorSpec, parameter: Parameter) -> Iterator[Finding]:
    """Whether a tensor can be copied into a parameter, and is then still what it was."""
    if entry.shape != parameter.shape:
        yield Finding(
            "refuses",
            "A5",
            disk,
            f"its shape is {list(entry.shape)}, the server has {list(parameter.shape)} there",
        )
    elif entry.dtype != parameter.dtype and parameter.read and lossy(files.read(disk), parameter.dtype):
        stored_as = str(entry.dtype).removeprefix("torch.")
        yield Finding(
            "ruins",
            "A5",
            disk,
            f"it is {stored_as} and is copied into {parameter}: other numbers, without a word",
        )
    elif parameter.dtype.is_floating_point and not (entry.dtype.is_floating_point or disk.endswith("offset")):
        stored_as = str(entry.dtype).removeprefix("torch.")
        why = f"it is {stored_as} and is copied into {parameter}: integers are not what they stand for, without a word"
        yield Finding("ruins", "A5", disk, why)


def lossy(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a cast, as ``copy_`` does it, changes some number by more than a hundredth."""
    if tensor.dtype in (torch.float32, torch.float16) and dtype == torch.bfloat16:
        return False  # rounds to 0.4 %, and nothing overflows
    wide, back = tensor.to(torch.float64), tensor.to(dtype).to(torch.float64)
    return bool(((back - wide).abs() > LOSS * wide.abs() + 1e-12).any() | ~torch.isfinite(back - wide).all())


def _unknown(files: Stored, disk: str, leaf: str, why: str) -> Finding:
    """A tensor for which the server has no parameter."""
    if leaf != "bias":
        return Finding("refuses", "A6", disk, f"{why}: the server has no parameter of that name")
    if not files.read(disk).any():
        return Finding("warns", "A6", disk, f"{why}: the server skips it, and it is zero")
    return Finding(
        "ruins", "A6", disk, f"{why}: the server skips a bias that it does not know, without a word"
    )


def _tied(files: Stored, sizes: Sizes, disk: str, name: str, names: Mapping[str, str]) -> Iterator[Finding]:
    """A tensor that config.json ties to another: the server drops it."""
    owner = sizes.ties.get(name)
    there = next((d for d, n in names.items() if n == owner), None)
    same = (
        there is not None
        and files.entries[there].shape == files.entries[disk].shape
        and files.entries[there].dtype == files.entries[disk].dtype
        and torch.equal(files.read(there), files.read(disk))
    )
    if same:
        yield Finding("warns", "A7", disk, f"tie_word_embeddings is true: it is dropped, and equals {there}")
    else:
        yield Finding(
            "ruins",
            "A7",
            disk,
            f"tie_word_embeddings is true: it is dropped without a word, and {owner} stands for it",
        )


def _unfilled(sizes: Sizes, server: Served, filled: set[str]) -> Iterator[Finding]:
    """Parameters that no tensor fills: they keep whatever memory held, because quantized models are not looked at."""
    for module, parameters in server.parameters.items():
        kind = server.kinds[module]
        for leaf, parameter in parameters.items():
            if f"{module}.{leaf}" in filled or not parameter.read:
                continue
            if leaf == "bias" and kind == "W8A8":
                continue  # folded into quant_bias, and never read
            yield _missing(f"{module}.{leaf}", kind)
    stacked = {
        f"{name}."
        for name in sizes.experts
        if f"{name}.0" in {m.rpartition(".")[0] for m in server.parameters}
    }
    split = {f"{name}." for name in sizes.experts if any(m.startswith(f"{name}.0.") for m in server.refused)}
    for name in sizes.floats:
        if name in filled or name in sizes.ties or name.startswith(tuple(stacked | split)):
            continue
        yield _missing(name, "FLOAT")


def _missing(name: str, kind: str) -> Finding:
    return Finding(
        "ruins",
        "A5",
        name,
        f"{kind} needs it and it is in no file: the server goes on with uninitialised memory",
    )


def _disagreeing(files: Stored, server: Served, disks: Mapping[str, str]) -> Iterator[Finding]:
    """Tensors that shards of a fused linear share: the last one that is loaded stands for all."""
    for layer, _ in server.layers.values():
        if not layer.fused:
            continue
        names = list(layer.shards)
        for leaf, parameter in server.parameters[names[0]].items():
            there = [disks[f"{name}.{leaf}"] for name in names if f"{name}.{leaf}" in disks]
            if not parameter.shared or len(there) < 2:
                continue
            if len({files.entries[disk].shape for disk in there}) > 1:
                continue  # told by shape
            first, *rest = (files.read(disk).to(torch.float64) for disk in there)
            if any(not torch.equal(first, other) for other in rest):
                listed = ", ".join(name.rpartition(".")[2] for name in names)
                why = f"{listed} have different ones, and the server keeps the one that is loaded last for all of them"
                yield Finding("ruins", "A8", f"{layer.name}.{leaf}", why)
