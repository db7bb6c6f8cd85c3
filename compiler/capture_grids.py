"""Attention on int8 grids in a model of transformers: a quantized cache, quantized queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..runtime.attention_grid import CacheGrid, HeadGrid, TokenGrid
from .capture_attention import attend_as_qc, explicit_mask
from .errors import Refused
from .safetensors_io import Entry

NAME = "qc_grids"
FA = ("fa_q", "fa_k", "fa_v")
CACHED = {"k_proj": 1, "v_proj": 2}
Grid = Callable[[Tensor], Tensor]


def _forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **others: Any) -> Any:
    operands = [query, key, value]
    for operand, grid in getattr(module, NAME, ()):
        operands[operand] = grid(operands[operand])
    return attend_as_qc(module, *operands, *rest, **others)


def register() -> None:
    """Make ``attn_implementation="qc_grids"`` known to transformers."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, explicit_mask)


def install_grids(
    model: PreTrainedModel, description: Mapping[str, Any], entries: Mapping[str, Entry],
    name_of: Callable[[str], str], where: str,
) -> frozenset[str]:  # fmt: skip
    """Give attention modules the grids that a description names, on meta; returns the modules that have some.

    Raises:
        Refused: The model has no such module.
    """
    found: dict[str, list[tuple[int, Grid]]] = {}
    for disk, kind in description.items():
        if kind == "C8" and disk.endswith(".kv_cache_scale"):
            module, _, _ = name_of(disk).rpartition(".")
            attention, _, leaf = module.rpartition(".")
            projection = _projection(_module(model, attention, where), leaf)
            grid = CacheGrid(projection, _count(entries, disk, where), device="meta")
            found.setdefault(attention, []).append((CACHED[leaf], grid))
        elif kind == "FAQuant" and disk.endswith(".scale"):
            module, _, _ = name_of(disk).rpartition(".")
            attention, _, leaf = module.rpartition(".")
            grid = HeadGrid(_count(entries, disk, where), device="meta")
            setattr(_module(model, attention, where), leaf, grid)
            found.setdefault(attention, []).append((FA.index(leaf), grid))
    for key, kind in description.items():
        if key.endswith(".quant_type") and isinstance(kind, str):
            attention = name_of(key.removesuffix("quant_type") + "x").removesuffix(".x")
            for operand in dynamic_operands(kind):
                found.setdefault(attention, []).append((operand, TokenGrid()))
    for attention, grids in found.items():
        setattr(_module(model, attention, where), NAME, tuple(grids))
    if found:
        register()
        model.set_attn_implementation(NAME)
    return frozenset(found)


def _count(entries: Mapping[str, Entry], disk: str, where: str) -> int:
    """How many channels or heads the scale of a grid has."""
    if disk not in entries:
        raise Refused(f"{where}: {disk} is in the description and in no file")
    if not entries[disk].shape:
        raise Refused(f"{where}: {disk} is one number; the scale of a grid has an axis of channels or heads")
    return entries[disk].shape[0]


def dynamic_operands(kind: str) -> list[int]:
    """Operands whose grid is found at run time, of a merged type such as ``QK_INT8_V_INT8_DYNAMIC``."""
    if kind == "INT8_DYNAMIC":
        return [0, 1, 2]
    words = kind.split("_")
    return [
        "QKV".index(letter)
        for at, word in enumerate(words)
        if set(word) <= set("QKV") and words[at + 1 : at + 3] == ["INT8", "DYNAMIC"]
        for letter in word
    ]


def _module(model: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise Refused(f"{where}: the model has no {name}, for which there is a grid") from None


def _projection(attention: nn.Module, leaf: str) -> nn.Module:
    """The child of an attention below whose name a cache is stored, made where queries, keys and values are one."""
    if not isinstance(getattr(attention, leaf, None), nn.Module):
        setattr(attention, leaf, nn.Module())
    return getattr(attention, leaf)


@torch.no_grad()
def check_grids_run(model: PreTrainedModel, attentions: frozenset[str], where: str) -> None:
    """Run two tokens, and refuse a model whose attentions do not come by their grids."""
    ran: set[str] = set()
    own = {name: getattr(model.get_submodule(name), NAME) for name in attentions}

    def seen(grid: Grid, name: str) -> Grid:
        def run(x: Tensor) -> Tensor:
            ran.add(name)
            return grid(x)

        return run

    for name, grids in own.items():
        watched = tuple((operand, seen(grid, name)) for operand, grid in grids)
        setattr(model.get_submodule(name), NAME, watched)
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except RuntimeError as error:
        raise Refused(
            f"{where}: a grid of a cache or an attention does not fit the model: {error}"
        ) from error
    finally:
        for name, grids in own.items():
            setattr(model.get_submodule(name), NAME, grids)
    missing = sorted(attentions - ran)
    if missing:
        raise Refused(
            f"{where}: {missing[0]} has a quantized cache or attention, and the code of this model does not let its"
            " attention be replaced: it can be served, and cannot be measured here"
        )
