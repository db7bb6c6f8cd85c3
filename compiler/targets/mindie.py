"""mindie: the files of the reference tool's saver for MindIE: the ascendv1 layout under other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...runtime.linear import IntegerLinear
from ...runtime.quantized import QuantizedLinear
from ...runtime.w8a8 import W8A8
from ..description import FOR_MINDIE, description_for_mindie
from ..scheme import LinearScheme
from ..shards import MINDIE as STEM
from . import ascendv1
from .ascendv1_files import consistent
from .modelslim import ModelSlim
from .served import LinearSite, ModelFacts
from .stored import stored
from .target import Finding, Layout, Problem

KINDS = ("W8A8", "W8A8_DYNAMIC")
"""Integer types that its saver writes."""


class MindieW8A8(W8A8):
    """Static W8A8 whose ``deq_scale`` is float32 in float16 models too."""

    def tensors(self, bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Those of W8A8."""
        return {**super().tensors(bias), "deq_scale": (torch.float32, (self.out_features,))}

    @classmethod
    def pack(cls, q: QuantizedLinear, dtype: torch.dtype, row_parallel: bool = False) -> dict[str, Tensor]:
        """The tensors on disk. ValueError as for every format."""
        packed = super().pack(q, dtype, row_parallel)
        bits = packed["deq_scale"]
        return {
            **packed,
            "deq_scale": bits.to(torch.int32).view(torch.float32) if bits.dtype == torch.int64 else bits,
        }


@dataclass(frozen=True)
class Mindie(ModelSlim):
    """W8A8 and W8A8_DYNAMIC; online rotations, divisions, branches and attentions as the reference tool has them."""

    name: ClassVar[str] = "mindie"
    summary: ClassVar[str] = "ascendv1 tensors under the file names of MindIE"

    def format_of(self, scheme: LinearScheme, rotated: bool) -> type[IntegerLinear] | None:
        """The format of a scheme: static or dynamic W8A8."""
        found = ascendv1.format_of(scheme, rotated)
        if found is None or found.type not in KINDS:
            return None
        return MindieW8A8 if found is W8A8 else found

    def check(self, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[Problem, ...]:
        """What the layout has no place for; types besides W8A8."""
        return tuple(
            Problem(
                p.rule,
                p.site,
                p.message,
                "take w8a8 or w8a8-static, the types that the saver of MindIE writes",
            )
            if p.rule == "type"
            else p
            for p in super().check(sites, model)
        )

    def stem(self, layout: Layout) -> str:
        """``quant_model_weight_w8a8``, after the type that names the model."""
        return STEM + kind_of(layout)

    def config(self, config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
        """As it is."""
        return dict(config)

    def files(self, layout: Layout) -> Mapping[str, Mapping[str, Any]]:
        """The description file, named after the type too."""
        return {f"{FOR_MINDIE}{kind_of(layout)}.json": ascendv1.description(layout)}

    def finish(self, directory: Path, layout: Layout) -> None:
        """One file of weights has no number and no index."""
        shards = sorted(directory.glob(f"{STEM}*.safetensors"))
        if len(shards) == 1:
            shards[0].rename(directory / f"{self.stem(layout)}.safetensors")
            (directory / f"{self.stem(layout)}.safetensors.index.json").unlink()

    def judge(
        self, directory: Path, *, tp: int = 1, deep: bool = True, trust_remote_code: bool = False
    ) -> tuple[Finding, ...] | None:
        """Whether tensors and description agree; what MindIE does beyond that nobody here has read."""
        return consistent(stored(directory), f"{FOR_MINDIE}*.json", lambda: description_for_mindie(directory))


def kind_of(layout: Layout) -> str:
    """The type that names the model, in lower case."""
    return str(ascendv1.description(layout)["model_quant_type"]).lower()


MINDIE = Mindie()
