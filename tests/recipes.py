"""Pieces of recipes that tests put together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Written = Callable[[str], Path]
"""Writes a text as ``recipe.yaml`` into a directory of the test."""
HEAD = "apiversion: modelslim_v1\nspec:\n  process:\n"
QCONFIGS = """
apiversion: modelslim_v1
w8a8: &w8a8
  weight: &weight {scope: per_channel, dtype: int8, symmetric: True, method: autoround}
  act: &act {scope: per_token, dtype: int8, symmetric: True, method: minmax}
w4a4: &w4a4
  weight: {<<: *weight, dtype: int4}
  act: {<<: *act, dtype: int4}
"""
INT8 = "{scope: per_channel, dtype: int8, symmetric: true, method: minmax}"
INT4_G64 = "{scope: per_group, dtype: int4, symmetric: true, method: minmax, ext: {group_size: 64}}"
TOKEN = "{scope: per_token, dtype: int8, symmetric: true, method: minmax}"
STATIC = "{scope: per_tensor, dtype: int8, symmetric: false, method: minmax}"
NONE = "{scope: per_tensor, dtype: float, symmetric: true, method: none}"
