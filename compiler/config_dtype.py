"""The dtype that a config names for the floats of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

KEYS = ("dtype", "torch_dtype")
"""How configs call it; the second is that of older files."""


def config_dtype(*parts: Any) -> torch.dtype | None:
    """What the first of these says that names a dtype; None where none does.

    Args:
        parts: Objects of JSON files: a ``quantization_config``, a config. The ``text_config`` in one is asked after it.
    """
    for part in parts:
        if isinstance(part, Mapping):
            for key in KEYS:
                found = getattr(torch, str(part.get(key)), None)
                if isinstance(found, torch.dtype):
                    return found
            below = config_dtype(part.get("text_config"))
            if below is not None:
                return below
    return None
