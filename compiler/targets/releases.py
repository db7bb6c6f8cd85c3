"""Releases of vllm-ascend: what each registers, and what it does with what it reads.

0.18 and 0.23 were read in the wheels of PyPI (0.18.0, 0.23.0), main in the repository of 2026-08-22.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .. import registry
from ..errors import Refused

SAFE = frozenset({"W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC"})
"""Types of dense linears that every release from 0.18 on registers."""
SAFE_EXPERTS = frozenset({"W8A8_DYNAMIC", "W4A8_DYNAMIC"})
"""Types of experts that every release from 0.18 on registers, for weights in the ascendv1 layout."""
NEWER = frozenset({"W8A8_MXFP8"})
NEWEST = NEWER | {
    "W4A4_MXFP4", "W4A4_MXFP4_FLATQUANT", "W4A8_MXFP", "W4A16_MXFP4", "W8A8FP8_DYNAMIC",
}  # fmt: skip
"""Types that are registered and whose ops the A2 and A3 have not."""


@dataclass(frozen=True)
class Release:
    """One release, by what a checkpoint can notice of it."""

    version: str
    dense: frozenset[str]
    """Types registered for linears."""
    experts: frozenset[str]
    """Types registered for mixtures."""
    elsewhere: frozenset[str]
    """Types that it registers for hardware of another generation."""
    grouped_w4a8: bool
    """Whether W4A8_DYNAMIC has a scale per group."""
    reads_offsets: bool
    """Whether the offset of an int8 cache is taken off again when it is read."""
    cached: frozenset[str]
    """Architectures whose scales of int8 caches it loads; empty where that is left to vLLM."""
    float_embedding: bool
    """Whether an embedding without an entry in the description is taken for float."""


RELEASES: Mapping[str, Release] = {
    one.version: one
    for one in (
        Release(
            "0.18", SAFE | {"W4A8_DYNAMIC"}, SAFE_EXPERTS | {"W8A8_MIX", "W4A16"}, NEWER,
            grouped_w4a8=True, reads_offsets=True, cached=frozenset({"Qwen3ForCausalLM"}), float_embedding=False,
        ),
        Release(
            "0.23", SAFE | {"W4A8_DYNAMIC"}, SAFE_EXPERTS | {"W8A8_MIX", "W4A16"}, NEWEST,
            grouped_w4a8=True, reads_offsets=False,
            cached=frozenset({"Qwen3ForCausalLM", "Glm4MoeForCausalLM", "MiniMaxM2ForCausalLM"}), float_embedding=True,
        ),
        Release(
            "main", SAFE, SAFE_EXPERTS | {"W4A16"}, NEWEST,
            grouped_w4a8=False, reads_offsets=False, cached=frozenset(), float_embedding=True,
        ),
    )
}  # fmt: skip
NEWEST_WHEEL = "0.23"
"""The release that is meant where none is named."""
DEVICES = ("A2", "A3")
"""Generations of Ascend NPUs whose rules these are; both have the same."""
OTHERS = {
    "A5": "its formats are those of MX numbers, which qc does not write",
    "310P": "it has linears of its own (W8A8S, W8A8SC), which qc does not write",
}


def release_named(version: str) -> Release:
    """The release of a version as it is spelled: ``0.23``, ``0.23.0``, ``main``. Refused where it is none of these."""
    short = (
        ".".join(version.split(".")[:2]) if version.endswith(".0") and version.count(".") == 2 else version
    )
    if short not in RELEASES:
        near = registry.close(version, RELEASES)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise Refused(
            f"unknown version {version!r} of vllm-ascend: there are rules for {', '.join(RELEASES)}{hint}"
        )
    return RELEASES[short]


def device_named(device: str) -> str:
    """``A2`` or ``A3``, however it is spelled. Refused for others."""
    name = device.upper()
    if name in OTHERS:
        raise Refused(f"device {device}: {OTHERS[name]}; there are {' and '.join(DEVICES)}")
    if name not in DEVICES:
        raise Refused(registry.unknown("device of vllm-ascend", device, DEVICES))
    return name
