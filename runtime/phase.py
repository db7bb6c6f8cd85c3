"""The two phases of a server, for linears that have an arithmetic for each (``W8A8_MIX``, "pd_mix")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .w8a8_mix import W8A8Mix

PHASES = ("prefill", "decode", "served")
"""``served`` follows a sequence: the prompt is prefilled, and every token behind it decoded."""
_HOOK = "_qc_phase"


def set_phase(model: nn.Module, phase: str) -> int:
    """Let every linear with two phases compute as in one of them; returns how many there are.

    Args:
        model: A quantized model; a model of transformers for ``served``, which looks at the cache that it is called
            with.
        phase: ``prefill`` (int8 per token, as after loading), ``decode`` (int8 on the fixed scale of calibration,
            whatever is run), or ``served``.

    Raises:
        ValueError: There is no such phase.
    """
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}: there are {', '.join(PHASES)}")
    linears = [module for module in model.modules() if isinstance(module, W8A8Mix)]
    hook = model.__dict__.pop(_HOOK, None)
    if hook is not None:
        hook.remove()

    def turn(decode: bool) -> None:
        for linear in linears:
            linear.decode = decode

    def look(_: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        cache = given.get("past_key_values")
        turn(cache is not None and cache.get_seq_length() > 0)

    turn(phase == "decode")
    if phase == "served" and linears:
        model.__dict__[_HOOK] = model.register_forward_pre_hook(look, with_kwargs=True)
    return len(linears)
