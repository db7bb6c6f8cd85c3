"""The parameters that vllm-ascend registers for a linear of each type: what tensors on disk are copied into.

Read in ``vllm_ascend/quantization/methods`` of 0.18.0 and 0.23.0, where both agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ...runtime.kronecker import split
from ...runtime.w4a8 import SHARES

INT8, INT32, INT64, F32 = torch.int8, torch.int32, torch.int64, torch.float32


@dataclass(frozen=True)
class Parameter:
    """One parameter of a layer of the server, or the part of it that belongs to one shard."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shared: bool = False
    """Whether all shards of a fused linear have it in common, so that the last one loaded is kept."""
    read: bool = True
    """Whether the server looks at it after loading."""

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def linear_parameters(
    kind: str,
    out: int,
    width: int,
    dtype: torch.dtype,
    *,
    bias: bool,
    ranks: int,
    group: int,
    row_parallel: bool,
) -> dict[str, Parameter]:
    """The parameters of a linear of type ``kind`` in a model of ``dtype``, as they lie on disk.

    Args:
        kind: Type string.
        out: Output channels of the shard.
        width: Input channels.
        dtype: Of the model's floats.
        bias: Whether the model has one there.
        ranks: Tensor-parallel ranks over which the input channels are cut; 1 where outputs are.
        group: Input channels per scale, for types that have groups.
        row_parallel: Whether input channels are cut at all.

    Raises:
        ValueError: The server cannot make such a layer; the message says what it trips over.
    """
    channel = {"weight_scale": Parameter(dtype, (out, 1)), "weight_offset": Parameter(dtype, (out, 1))}
    static = {
        "input_scale": Parameter(dtype, (1,), shared=True),
        "input_offset": Parameter(INT8, (1,), shared=True),
        "quant_bias": Parameter(INT32, (out,)),
        "deq_scale": Parameter(INT64 if dtype == torch.float16 else F32, (out,)),
    }
    integers = {"weight": Parameter(INT8, (out, width))}
    own: Mapping[str, Parameter]
    if kind == "FLOAT":
        own = {"weight": Parameter(dtype, (out, width))}
    elif kind == "W8A8":
        own = integers | static | {name: replace(one, read=False) for name, one in channel.items()}
    elif kind == "W8A8_MIX":
        own = integers | static | channel | {"weight_offset": replace(channel["weight_offset"], read=False)}
    elif kind in ("W8A8_DYNAMIC", "W8A16"):
        own = integers | channel
    elif kind in ("W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC"):
        own = integers | {name: replace(one, dtype=F32) for name, one in channel.items()}
        if width % 8:
            raise ValueError(f"its {width} input channels are no packs of 8 int4")
        if kind == "W4A4_FLATQUANT_DYNAMIC":
            left, right = split(width // ranks)
            own |= {
                "left_trans": Parameter(dtype, (left, left), shared=True),
                "right_trans": Parameter(dtype, (right, right), shared=True),
                "clip_ratio": Parameter(F32, (1,), shared=True),
            }
    elif kind == "W4A8_DYNAMIC":
        if not group:
            raise ValueError(
                "it has linears of W4A8_DYNAMIC in groups alone, and group_size is 0 (ZeroDivisionError)"
            )
        grouped = Parameter(dtype, (out, width // group))
        own = channel | {
            "weight": Parameter(INT8, (out // 2, width)),
            "weight_scale_second": grouped,
            "weight_offset_second": grouped,
            "scale_bias": Parameter(F32, (out, SHARES if row_parallel else 1)),
        }
    else:
        raise ValueError(f"there is no linear of type {kind}")
    return {**own, "bias": Parameter(dtype, (out,))} if bias else dict(own)


def expert_parameters(
    kind: str, out: int, width: int, dtype: torch.dtype, *, bias: bool, group: int, row_parallel: bool
) -> dict[str, Parameter]:
    """The same for one linear of one expert."""
    channel = {"weight_scale": Parameter(dtype, (out, 1)), "weight_offset": Parameter(dtype, (out, 1))}
    integers = {"weight": Parameter(INT8, (out, width))}
    if kind == "FLOAT":
        own = {"weight": Parameter(dtype, (out, width))}
    elif kind == "W8A8_DYNAMIC":
        own = integers | channel
    elif kind == "W8A8_MIX":
        own = (
            integers | channel | {"deq_scale": Parameter(F32, (out,)), "input_offset": Parameter(INT8, (1,))}
        )
    elif kind == "W4A8_DYNAMIC":
        wide = {name: replace(one, dtype=F32) for name, one in channel.items()}
        own = wide | {
            "weight": Parameter(INT8, (out // 2, width)),
            "scale_bias": Parameter(F32, (out, SHARES if row_parallel else 1)),
        }
        if group:
            second = Parameter(F32, (out, width // group))
            own |= {"weight_scale_second": second, "weight_offset_second": second}
    else:
        raise ValueError(f"there are no experts of type {kind}")
    return {**own, "bias": Parameter(dtype, (out,))} if bias else own
