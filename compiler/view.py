"""BlockView: what a pass sees of one block while its unknowns are solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..runtime.linear import IntegerLinear
from ..runtime.quantized import QuantizedLinear
from .device import CPU
from .operand import Quantize, Statistic
from .scheme import LinearScheme

if TYPE_CHECKING:
    from .walk import Walk

LinearHook = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]
"""``hook(name, x [..., in], weight [out, in], bias [out] or None) -> y [..., out]`` in the place of a linear."""


@dataclass
class BlockView:
    """Weights, statistics and (for training) inputs and targets of one block, in the state that a pass sees."""

    name: str
    tensors: Mapping[str, Tensor]
    """Float32, by qualified name, on ``device``."""
    statistics: Mapping[Statistic, Tensor]
    export_dtype: torch.dtype
    seed: int
    device: torch.device = CPU
    """Where the block runs: all tensors of the view lie there, and what a pass makes beside them has to."""
    together: Callable[[str], tuple[str, ...]] = lambda name: (name,)
    """The linears that read the same value as one of them, itself included."""
    transposed: frozenset[str] = frozenset()
    """Linears whose weight ``tensors`` holds as [in, out]."""
    quantized: Mapping[str, QuantizedLinear] = field(default_factory=dict)
    """Linears that an earlier pass quantized."""
    schemes: Mapping[str, LinearScheme] = field(default_factory=dict)
    """Their schemes."""
    online: Mapping[str, str] = field(default_factory=dict)
    """Linears behind an online rotation that is stored beside them, with its kind."""
    planned: Mapping[str, Quantize] = field(default_factory=dict)
    """What later passes of the plan are going to make of linears."""
    formats: Mapping[str, type[IntegerLinear] | None] = field(default_factory=dict)
    """In which format of the target each linear of the plan is going to be stored."""
    batches: int = 0
    """Number of microbatches for ``forward`` and ``target``."""
    forward: Callable[[LinearHook, int], Tensor] | None = None
    """Run the block on microbatch i of its training inputs, with every linear replaced by the hook."""
    walk: Callable[[], Walk] | None = None
    """A new walk over the block on its training inputs, for what linears read one after another."""
    target: Callable[[int], Tensor] | None = None
    """What the float block computes for microbatch i, [batch, seq, hidden]."""
    recompute: bool = False
    """Whether memory is short, so that a training makes the weights on their grids again in its backward pass."""
    report: Callable[[str], None] = lambda text: None
    """Progress inside a long solve, one line."""
    measures: dict[str, float] = field(default_factory=dict)
    """Numbers that a pass found and the journal keeps, by name."""
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Numbers by the step of a search or a training, which the journal keeps too."""

    def weight(self, module: str) -> Tensor:
        """Weight of a linear [out, in] or norm [channels], float32."""
        weight = self.tensors[f"{module}.weight"]
        return weight.T if module in self.transposed else weight

    def bias(self, module: str) -> Tensor | None:
        """Bias [out] float32, or None."""
        return self.tensors.get(f"{module}.bias")

    def statistic(self, statistic: Statistic) -> Tensor:
        """What was observed, float32; its shape is that of its kind, see ``compiler.statistics``."""
        return self.statistics[statistic]

    def made(self, weight: Callable[[], Tensor]) -> Tensor:
        """What ``weight`` makes of what is trained, differentiable.

        Where memory is short, what it makes on the way is made again in the backward pass; the numbers are the same.
        """
        if not self.recompute:
            return weight()
        return checkpoint(weight, use_reentrant=False, preserve_rng_state=False)

    def generator(self, site: str) -> torch.Generator:
        """Random numbers that depend on (seed, site) alone, not on the order of work nor on the device.

        They are drawn on the host: move what is drawn to ``device``.
        """
        digest = torch.tensor([ord(c) for c in site], dtype=torch.int64)
        weights = torch.arange(1, len(site) + 1, dtype=torch.int64)
        mixed = int((digest * weights * 2654435761).sum()) & 0x7FFFFFFF
        return torch.Generator().manual_seed(self.seed * 1_000_003 + mixed)
