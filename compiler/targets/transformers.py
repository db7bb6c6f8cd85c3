"""transformers: a checkpoint that ``from_pretrained`` loads once ``qc.hf`` is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..description import block_of
from . import ascendv1
from .modelslim import ModelSlim
from .target import Finding, Layout


@dataclass(frozen=True)
class Transformers(ModelSlim):
    """Every type that qc's modules run. The tensors are those of the ascendv1 layout, under the names of transformers.

    config.json has a ``quantization_config``, in the place of a description file.
    """

    name: ClassVar[str] = "transformers"
    summary: ClassVar[str] = "for from_pretrained of transformers, after import qc.hf"

    def stem(self, layout: Layout) -> str:
        """Where transformers looks for weights."""
        return "model"

    def config(self, config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
        """With the types of the linears."""
        dtype = config.get("dtype") or config.get("torch_dtype")
        return {**config, "quantization_config": block_of(ascendv1.description(layout), str(dtype))}

    def judge(
        self, directory: Path, *, tp: int = 1, deep: bool = True, trust_remote_code: bool = False
    ) -> tuple[Finding, ...] | None:
        """What ``from_pretrained`` does with a directory once ``qc.hf`` is imported."""
        from .transformers_files import judged

        return judged(directory, trust_remote_code)

    def files(self, layout: Layout) -> Mapping[str, Mapping[str, Any]]:
        """None: config.json says it all."""
        return {}


TRANSFORMERS = Transformers()
