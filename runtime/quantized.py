"""QuantizedLinear: what a quantizing pass finds out about one linear, before any format is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .outlier_weights import CSR
from .quantize import dequantize
from .sparse_rows import sparse


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """Integers and scales of one linear; ``pack`` of a format turns it into tensors on disk.

    The integers must have been computed from scales that are representable in the dtype in which the server
    holds them (``scale_dtype`` of the format), otherwise packing refuses.
    """

    weight: Tensor
    """int8 [out, in]; a 4-bit format uses -8..7."""
    scale: Tensor
    """float32 [out, 1], or [out, groups] along the input channels."""
    bias: Tensor | None = None
    """Float [out]."""
    input_scale: Tensor | None = None
    """float32 [1], for a static activation."""
    input_offset: Tensor | None = None
    """[1], integral within int8, signed domain: x is about (q - offset) * input_scale."""
    left: Tensor | None = None
    """[a, a], the left factor of an online rotation, already folded into the weight."""
    right: Tensor | None = None
    """[b, b], the right factor."""
    online: str | None = None
    """The kind of a rotation that is stored as the reference tool does: ``heads`` or ``kronecker``."""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """What stays in float beside the integers, already taken off the weight: tensors by their leaf on disk."""
    clip: float = 1.0
    """Ratio in (0, 1] by which the per-token scale of the activation is cut."""
    offset: Tensor | None = None
    """Of the shape of ``scale``, integral: the weight is about (q - offset) * scale; None is symmetric."""

    @property
    def dense(self) -> Tensor:
        """The weight that the integers stand for, single weights in float among them, float32 [out, in]."""
        dense = dequantize(self.weight, self.scale, self.offset)
        if CSR[0] in self.beside:
            dense = dense + sparse(*(self.beside[leaf] for leaf in CSR), in_features=dense.shape[1])
        return dense
