"""Route a transformers model's attention through ``qc::attention``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from .attention import attention

NAME = "qc"
HARMLESS = frozenset({"position_ids", "cache_position", "sliding_window", "use_cache", "is_causal"})
"""Arguments that the arithmetic of attention does not depend on once a mask is given.

The window of a sliding layer is in the mask; positions are in q and k.
"""


class Uncarried(Exception):
    """The model hands its attention something that ``qc::attention`` has no operand for."""


def attend_as_qc(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in the place of an attention: ``qc::attention`` of its operands."""
    where = type(module).__name__
    extra = sorted(k for k, v in others.items() if v is not None and v is not False and k not in HARMLESS)
    if extra:
        raise Uncarried(f"{where} gives its attention {', '.join(extra)}")
    if dropout:
        raise Uncarried(f"{where} gives its attention a dropout of {dropout} outside training")
    causal = others.get("is_causal")
    if attention_mask is None and (getattr(module, "is_causal", True) if causal is None else causal):
        raise Uncarried(f"{where} is causal and gives its attention no mask")
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    cap = None if softcap is None else float(softcap)
    return attention(query, key, value, attention_mask, scale, cap, s_aux), None


def explicit_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of an attention, always a tensor of booleans."""
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **kwargs)


def register() -> None:
    """Make ``attn_implementation="qc"`` known to transformers; its masks are always explicit and bool."""
    AttentionInterface.register(NAME, attend_as_qc)
    AttentionMaskInterface.register(NAME, explicit_mask)


@contextlib.contextmanager
def finite_eager_masks() -> Iterator[None]:
    """Let transformers' own attention run in float64 on inputs with padding.

    Its mask is the least number of the model's dtype and its softmax is in float32 always: in float64 a row
    that is masked everywhere would overflow to NaN. In this context the mask is the least float32.
    """
    own = ALL_MASK_ATTENTION_FUNCTIONS["eager"]

    def mask(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs | {"dtype": torch.float32})

    AttentionMaskInterface.register("eager", mask)
    try:
        yield
    finally:
        AttentionMaskInterface.register("eager", own)
