"""Input maps: how what a linear reads differs between two solutions of the same passes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .edit import Edit, Get, Verb, vector_of
from .operand import Divisor, Slot, Statistic
from .program import Leaf


class InputMap:
    """``x -> a x + b`` per channel, from what a linear read before all passes to what it reads now.

    Exact edits keep the function, so the input of a linear changes by what was done to its columns and by nothing else:
    a scale s divides it, a shift z is subtracted. After an edit that mixes channels, the map starts again.
    """

    def __init__(self, a: Tensor, b: Tensor, mixed: int = 0) -> None:
        self.a, self.b, self.mixed = a, b, mixed

    @classmethod
    def identity(cls, width: int) -> InputMap:
        """Nothing was done yet."""
        return cls(torch.ones(width), torch.zeros(width))

    def after(self, leaf: Leaf, edit: Edit, values: Mapping[Slot, Tensor], get: Get) -> InputMap:
        """The map once one more edit is made; ``get`` looks up the tensors before it."""
        if edit.verb in (Verb.SCALE_IN, Verb.SHIFT_IN):
            vector = vector_of(leaf, edit, values, get, torch.float32)
        elif edit.verb is Verb.DIVIDE:
            assert isinstance(edit.operand, Divisor)
            vector = values[edit.operand.slot].float()
        elif edit.verb in (Verb.ROTATE_IN, Verb.WRAP):
            return InputMap(torch.ones_like(self.a), torch.zeros_like(self.b), self.mixed + 1)
        else:
            return self
        a, b = self.a.clone(), self.b.clone()
        where = slice(None) if edit.site.channels is None else torch.tensor(edit.site.channels)
        if edit.verb is Verb.SHIFT_IN:
            b[where] -= vector
        else:
            a[where], b[where] = a[where] / vector, b[where] / vector
        return InputMap(a, b, self.mixed)

    def to(self, other: InputMap) -> tuple[Tensor, Tensor]:
        """Factor and offset [channels] from this map's inputs to the other's; one and zero where there are none."""
        factor = other.a / self.a
        offset = other.b - self.b * factor
        sound = factor.isfinite() & offset.isfinite()
        return torch.where(sound, factor, 1.0), torch.where(sound, offset, 0.0)


def moved(statistic: Statistic, value: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """A statistic of inputs x as one of ``factor x + offset``.

    Exact for ``range`` and ``rows``, and without an offset for ``absmax``, ``absmean``, ``meansquare`` and ``hessian``,
    which leave it out. A ``histogram`` of all channels stays as it is.
    """
    kind = statistic.kind.partition(":")[0]
    if kind == "range" or kind == "rows":
        return value * factor + offset
    if kind in ("absmax", "absmean"):
        return value * factor.abs()
    if kind == "meansquare":
        return value * factor.square()
    if kind == "hessian":
        return value * torch.outer(factor, factor)
    return value
