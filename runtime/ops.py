"""Importing this defines every op of the namespace ``qc`` that a quantized linear, norm or cache runs."""

from __future__ import annotations

from . import cache_ops, norm, w4a4, w4a8, w8a8, weight_only
from .op import decompositions as decompositions

MODULES = (cache_ops, norm, w4a4, w4a8, w8a8, weight_only)
"""Where they are defined."""
