"""What the recipe language can say and qc does not do yet: known names, so that they are refused in plain words.

Whoever builds one takes its name out of here; a test compares these tables with what is registered.
"""

from __future__ import annotations

from collections.abc import Mapping

API_VERSIONS: Mapping[str, str] = {
    "modelslim_v0": "the reference tool's older interface, which is no recipe",
    "multimodal_vlm_modelslim_v1": "recipes of vision-language models",
    "multimodal_sd_modelslim_v1": "recipes of diffusion models",
    "modelslim_convert": "conversion of checkpoints",
}
"""Values of ``apiversion`` besides ``modelslim_v1``, and what they are."""

PROCESSORS = frozenset({
    "unary_analysis", "binary_analysis",
    "binary_operator_layer_wise", "binary_operator_model_wise",
})  # fmt: skip

OPTIONS: Mapping[str, Mapping[str, str]] = {
    "online_quarot": {"block_size": "the split of an online rotation is the server's own"},
}
"""Processor to its options that are missing, each with what it is for or what there is instead."""

RUNNERS = frozenset({"model_wise", "dp_layer_wise"})
