"""Whether heads and channels can be dealt out over the ranks of vllm-ascend (A10): vLLM asserts it where it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...runtime.w4a8 import SHARES
from ..capture_sizes import Sizes
from .stored import Stored
from .target import Finding
from .vllm_layers import ROW_PARALLEL, Served


def ranks(files: Stored, sizes: Sizes, server: Served, tp: int) -> Iterator[Finding]:
    """What ``tp`` ranks do not divide: heads, channels that its row-parallel linears, MLPs and experts deal out.

    Linears that a model class may keep whole on every rank (routers, projections to a latent) are not asked.
    """
    if tp == 1:
        return
    text = files.config.get("text_config")
    config = text if isinstance(text, Mapping) else files.config
    heads = _positive(config.get("num_attention_heads"))
    keys = _positive(config.get("num_key_value_heads")) or heads
    if heads % tp:
        yield _undivided("config.json", f"{heads} heads", tp)
    elif "kv_lora_rank" not in config and keys and keys % tp and tp % keys:
        yield _undivided("config.json", f"{keys} heads of keys", tp)
    for layer, kind in server.layers.values():
        own = layer.name.rpartition(".")[2]
        cut = {
            name: one.width if layer.row_parallel else one.out
            for name, one in layer.shards.items()
            if layer.row_parallel or own == "gate_up_proj"
        }
        for name, channels in cut.items():
            if channels % tp:
                yield _undivided(name, f"{channels} channels", tp)
            elif layer.row_parallel and kind.startswith("W4A4") and channels // tp % 8:
                why = f"int4 goes in packs of 8, and each of {tp} ranks has {channels // tp} of its channels"
                yield Finding("refuses", "A10", name, why)
    for mixture, linears in sizes.experts.items():
        for name, one in linears.items():
            if name in ROW_PARALLEL and one.width % tp:
                yield _undivided(f"{mixture}.0.{name}", f"{one.width} channels", tp)
            elif (
                name in ROW_PARALLEL
                and server.kinds.get(f"{mixture}.0.{name}") == "W4A8_DYNAMIC"
                and SHARES % tp
            ):
                yield _undivided(f"{mixture}.0.{name}", f"sums over {SHARES} stretches of its channels", tp)


def _positive(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _undivided(name: str, what: str, tp: int) -> Finding:
    return Finding("refuses", "A10", name, f"{what} do not divide over {tp} ranks")
