"""Half-precision linears at the speed of float32, on a CPU that has no half-precision units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from ..runtime.cpu_units import has_units

HALF = (torch.bfloat16, torch.float16)


def has_half_units() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, or Arm's bf16)."""
    return has_units("bf16")


class HalfLinear(TorchFunctionMode):
    """While active, a linear of half-precision operands is a float32 product that is rounded once.

    That is what half-precision units compute (products summed in float32, one rounding of the sum) up to the
    order of the sum. torch emulates it on a CPU without them, three times slower.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Intercept ``torch.nn.functional.linear``; let everything else pass."""
        given = kwargs or {}
        if func is linear and isinstance(args[0], Tensor) and args[0].dtype in HALF:
            operands = [None if value is None else value.to(torch.float32) for value in args]
            named = {
                name: value if value is None else value.to(torch.float32) for name, value in given.items()
            }
            return func(*operands, **named).to(args[0].dtype)
        return func(*args, **given)
