"""Edits: the only thing that changes a program. A small closed set of verbs, each with a weight side.

A pass answers a match with edits; all edits of one answer read the state before it and are applied together.
The graph side is applied when the plan is made, the weight side when the tensors of a block are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ..runtime.divided import LEAF
from ..runtime.kronecker import fold
from ..runtime.low_rank import FACTORS
from ..runtime.outlier_channels import CHANNELS
from .errors import Failed
from .operand import (
    Divisor,
    Gain,
    Hadamard,
    Kronecker,
    LowRank,
    NormBias,
    Operand,
    Ordered,
    Outliers,
    Permutation,
    Quantize,
    Slot,
    Stub,
    Vector,
    Weight,
    factors_of,
)
from .pattern import Site
from .pieces import on_pieces, runs
from .program import Leaf, Program


class Verb(Enum):
    """What an edit does to the weight W [out, in] and bias b [out] of a linear, or the gain g of a norm."""

    SCALE_OUT = "W <- diag(s) W, b <- s b; g <- s g"
    SCALE_IN = "W <- W diag(s)"
    SHIFT_OUT = "norm bias <- bias - z"
    SHIFT_IN = "b <- b + W z"
    ROTATE_OUT = "W <- Qᵀ W, b <- Qᵀ b; an embedding's rows likewise"
    ROTATE_IN = "W <- W Q"
    SET_UNIT = "g <- 1"
    WRAP = "an online rotation before the linear, W <- L⁻¹ W R⁻ᵀ"
    DIVIDE = "an online division by s before the linear, W <- W diag(s)"
    BRANCH = "W <- W - L2 L1, beside it x -> L2 (L1 x); or columns of W and channels of x moved beside it"
    SET_WEIGHT = "W <- a solved W"
    SWAP = "a quantized linear in its place"
    STUB = "q, k or v of an attention on an int8 grid"
    UNTIE = "a tensor of its own instead of a shared one"


BESIDE_INTEGERS = (Verb.WRAP, Verb.BRANCH, Verb.SWAP)
"""Edits that targets have room for at integer linears alone, and that are not there yet while formats are compared."""


@dataclass(frozen=True)
class Edit:
    """One verb at one site with one operand."""

    verb: Verb
    site: Site
    operand: Operand = None

    def __str__(self) -> str:
        shown = (
            f" {self.operand}"
            if isinstance(self.operand, (Hadamard, Permutation, Kronecker, LowRank, Outliers))
            else ""
        )
        if isinstance(self.operand, Stub):
            shown = f" {self.operand}"
        if isinstance(self.operand, Quantize):
            shown = f" {self.operand.scheme}"
        return f"{self.verb.name.lower()} {self.site}{shown}"

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The unknowns in it."""
        if isinstance(self.operand, (Kronecker, LowRank, Outliers)):
            return self.operand.slots
        return (
            (self.operand.slot,)
            if isinstance(self.operand, (Vector, Permutation, Divisor, Weight, Quantize, Stub))
            else ()
        )


Get = Callable[[str], Tensor | None]
"""Looks up a qualified tensor name in the state before the edits; None where there is no such tensor."""


def by_module(edits: Iterable[Edit]) -> dict[str, list[Edit]]:
    """Edits by module, in order: the modules whose tensors change."""
    found: dict[str, list[Edit]] = {}
    for edit in edits:
        found.setdefault(edit.site.module, []).append(edit)
    return found


def apply(
    program: Program,
    module: str,
    edits: Iterable[Edit],
    values: Mapping[Slot, Tensor],
    get: Get,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of ``module`` after ``edits``, by local name, computed in ``dtype``.

    ``get`` gives the state before. Nothing of it is changed in place; the weight of a large linear is copied once and
    then edited in pieces. SWAP, STUB and UNTIE do not change numbers.
    """
    leaf = program.leaves[module]
    tensors = {
        name: tensor.to(dtype, copy=True)
        for name in leaf.parameters if (tensor := get(f"{module}.{name}")) is not None
    }  # fmt: skip
    bias = get(f"{module}.bias")
    if bias is not None:
        tensors["bias"] = bias.to(dtype)
    if leaf.transposed and "weight" in tensors:
        tensors["weight"] = tensors["weight"].T
    for axis, some in runs(edits, lambda edit: AXES.get(edit.verb) if leaf.kind == "linear" else None):

        def change(tensors: Tensors, some: list[Edit] = some) -> None:
            for edit in some:
                VERBS[edit.verb](leaf, tensors, edit, values, get, dtype)

        on_pieces(tensors, axis, change)
    if leaf.transposed and "weight" in tensors:
        tensors["weight"] = tensors["weight"].T
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


Tensors = dict[str, Tensor]
Values = Mapping[Slot, Tensor]


def vector_of(leaf: Leaf, edit: Edit, values: Values, get: Get, dtype: torch.dtype) -> Tensor:
    """The scale or shift [channels of the site] of an edit that has one, from the state before."""
    operand = edit.operand
    if isinstance(operand, Vector):
        return operand.value(values, dtype)
    if isinstance(operand, Gain):
        weight = get(f"{operand.norm}.weight")
        if weight is None:
            raise Failed(f"{edit}: the norm {operand.norm} has no weight")
        gain = weight.to(dtype) + operand.offset
        if operand.inverse and not bool(gain.all()):
            raise Failed(
                f"{operand.norm} has a gain of zero in {int((gain == 0).sum())} channels, so its bias can not be moved"
                " before the gain: leave quarot (fuse_norms) out for this model"
            )
        return 1 / gain if operand.inverse else gain
    if isinstance(operand, NormBias):
        bias = get(f"{operand.norm}.bias")
        if bias is None:
            raise Failed(f"{edit}: the norm {operand.norm} has no bias")
        return bias.to(dtype)
    raise Failed(f"{edit}: {operand!r} is not a vector")


def _scale_out(
    leaf: Leaf, tensors: Tensors, edit: Edit, values: Values, get: Get, dtype: torch.dtype
) -> None:
    scale = vector_of(leaf, edit, values, get, dtype)
    if leaf.norm is not None:
        tensors["weight"] = (tensors["weight"] + leaf.norm.offset) * scale - leaf.norm.offset
    else:
        rows = _index(edit.site)
        tensors["weight"] = _put(tensors["weight"], rows, lambda w: w * scale[:, None])
    if "bias" in tensors:
        tensors["bias"] = _put(tensors["bias"], _index(edit.site), lambda b: b * scale)


def _scale_in(leaf: Leaf, tensors: Tensors, edit: Edit, values: Values, get: Get, dtype: torch.dtype) -> None:
    scale = vector_of(leaf, edit, values, get, dtype)
    tensors["weight"] = _put(tensors["weight"].T, _index(edit.site), lambda w: w * scale[:, None]).T


def _shift_out(
    leaf: Leaf, tensors: Tensors, edit: Edit, values: Values, get: Get, dtype: torch.dtype
) -> None:
    shift = vector_of(leaf, edit, values, get, dtype)
    tensors["bias"] = tensors.get("bias", torch.zeros_like(shift)) - shift


def _shift_in(leaf: Leaf, tensors: Tensors, edit: Edit, values: Values, get: Get, dtype: torch.dtype) -> None:
    shift = vector_of(leaf, edit, values, get, dtype)
    weight = tensors["weight"]
    tensors["bias"] = tensors.get("bias", weight.new_zeros(weight.shape[0])) + weight @ shift


def _rotation(edit: Edit, values: Values) -> Hadamard | Ordered:
    if isinstance(edit.operand, Permutation):
        found = edit.operand.of(values)
        if not torch.equal(found.order.sort().values, torch.arange(len(found.order))):
            raise Failed(
                f"{edit}: {edit.operand.slot.name} does not hold every channel once, so it is no order"
            )
        return found
    assert isinstance(edit.operand, Hadamard)
    return edit.operand


def _rotate_out(
    leaf: Leaf, tensors: Tensors, edit: Edit, values: Values, get: Get, dtype: torch.dtype
) -> None:
    rotation, rows = _rotation(edit, values), _index(edit.site)
    if leaf.norm is not None:  # with unit gain it lets the rotation through and adds its bias behind it
        tensors["bias"] = rotation.times(tensors["bias"])
        return
    if leaf.kind == "embedding":  # rows of the table are values: E <- E Q
        tensors["weight"] = rotation.times(tensors["weight"])
        return
    tensors["weight"] = _put(tensors["weight"], rows, lambda w: rotation.times(w.T).T)
    if "bias" in tensors:
        tensors["bias"] = _put(tensors["bias"], rows, rotation.times)


def _rotate_in(
    leaf: Leaf, tensors: Tensors, edit: Edit, values: Values, get: Get, dtype: torch.dtype
) -> None:
    rotation = _rotation(edit, values)
    tensors["weight"] = _put(tensors["weight"].T, _index(edit.site), lambda w: rotation.times(w.T).T).T


def _set_unit(leaf: Leaf, tensors: Tensors, edit: Edit, values: Values, get: Get, dtype: torch.dtype) -> None:
    assert leaf.norm is not None
    tensors["weight"] = torch.full_like(tensors["weight"], 1 - leaf.norm.offset)


def _wrap(leaf: Leaf, tensors: Tensors, edit: Edit, values: Values, get: Get, dtype: torch.dtype) -> None:
    assert isinstance(edit.operand, Kronecker)
    left, right = factors_of(edit.operand, values)
    weight = tensors["weight"]
    pieces = weight.reshape(-1, left.shape[0] * right.shape[0])
    tensors["weight"] = fold(pieces, left, right).to(dtype).reshape(weight.shape)
    tensors["left_trans"], tensors["right_trans"] = left.to(dtype), right.to(dtype)
    for clip in edit.operand.slots[2:]:
        tensors["clip_ratio"] = values[clip].to(dtype)


def _divide(leaf: Leaf, tensors: Tensors, edit: Edit, values: Values, get: Get, dtype: torch.dtype) -> None:
    operand = edit.operand
    assert isinstance(operand, Divisor)
    reciprocal = (1 / values[operand.slot].to(torch.float64)).to(operand.dtype).to(dtype)
    tensors["weight"] = tensors["weight"] / reciprocal
    tensors[LEAF] = reciprocal


def _branch(leaf: Leaf, tensors: Tensors, edit: Edit, values: Values, get: Get, dtype: torch.dtype) -> None:
    operand, weight = edit.operand, tensors["weight"]
    if isinstance(operand, Outliers):
        index = values[operand.index]
        used = index[index >= 0].long()
        columns = weight.new_zeros(len(weight), len(index))
        columns[:, : len(used)] = weight[:, used]
        tensors["weight"] = weight.index_fill(1, used, 0)
        tensors |= dict(zip(CHANNELS, (index, columns), strict=True))
        return
    assert isinstance(operand, LowRank)
    first, second = (values[slot].to(operand.dtype).to(dtype) for slot in (operand.first, operand.second))
    tensors["weight"] = weight - second @ first
    tensors |= dict(zip(FACTORS, (first, second), strict=True))


def _set_weight(
    leaf: Leaf, tensors: Tensors, edit: Edit, values: Values, get: Get, dtype: torch.dtype
) -> None:
    assert isinstance(edit.operand, Weight)
    tensors["weight"] = values[edit.operand.slot].to(dtype)


def _nothing(leaf: Leaf, tensors: Tensors, edit: Edit, values: Values, get: Get, dtype: torch.dtype) -> None:
    return


VERBS = {
    Verb.SCALE_OUT: _scale_out, Verb.SCALE_IN: _scale_in, Verb.SHIFT_OUT: _shift_out, Verb.SHIFT_IN: _shift_in,
    Verb.ROTATE_OUT: _rotate_out, Verb.ROTATE_IN: _rotate_in, Verb.SET_UNIT: _set_unit, Verb.WRAP: _wrap,
    Verb.DIVIDE: _divide, Verb.BRANCH: _branch, Verb.SET_WEIGHT: _set_weight,
    Verb.SWAP: _nothing, Verb.STUB: _nothing, Verb.UNTIE: _nothing,
}  # fmt: skip

AXES = {
    Verb.SCALE_IN: 0, Verb.SHIFT_IN: 0, Verb.ROTATE_IN: 0, Verb.WRAP: 0, Verb.DIVIDE: 0,
    Verb.SCALE_OUT: 1, Verb.ROTATE_OUT: 1,
}  # fmt: skip
"""Verbs that treat each row (0) or each column (1) of the weight of a linear by itself."""


def _index(site: Site) -> Tensor | None:
    return None if site.channels is None else torch.tensor(site.channels)


def _put(tensor: Tensor, rows: Tensor | None, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function`` on the rows ``rows`` of a tensor (all of them for None), the others as they were."""
    if rows is None:
        return function(tensor)
    result = tensor.clone()
    result[rows] = function(tensor[rows])
    return result
