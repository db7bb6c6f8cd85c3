"""The ops of the namespace ``qc``: one definition gives the schema, the kernels, the fake kernel and the NPU body.

A kernel is plain torch and is what the op means; it runs on CPU and CUDA. An NPU body calls only ``torch.ops.npu`` and
makes views (but that of ``sparse_rows``, for which there is none). It is registered for PrivateUse1, the key under
which torch_npu registers its device, and it is the op's decomposition too:
``program.run_decompositions(decompositions())``. torch_npu itself is never imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("qc", "FRAGMENT")
_BODIES: dict[Any, Callable[..., Any]] = {}

NPU_DTYPES = {
    torch.int8: 1,
    torch.int32: 3,
    torch.float16: 5,
    torch.float32: 6,
    torch.qint8: 12,
    torch.bfloat16: 15,
}
"""How the raw ops of torch_npu number the dtypes."""
QUINT4X2 = 16
"""That of two int4 in a byte, which come out as eight in an int32."""


def define(
    schema: str, *, kernel: Callable[..., Any], fake: Callable[..., Any], npu: Callable[..., Any]
) -> Any:
    """Define ``qc::`` + ``schema`` and return its overload.

    Args:
        schema: Name, arguments and results, in the language of ``torch.library``.
        kernel: The op on tensors of CPU or CUDA; no result may be a view of an argument.
        fake: Shapes and dtypes of the results alone.
        npu: The same op in calls of ``torch.ops.npu`` and views.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)
    LIBRARY.impl(name, npu, "PrivateUse1")
    torch.library.register_fake(f"qc::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.qc, name).default
    _BODIES[overload] = npu
    return overload


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Overload to NPU body, of every op defined so far (``runtime.ops`` defines all); each call gives a new dict."""
    return dict(_BODIES)


def flat(x: Tensor) -> Tensor:
    """x [..., K] as rows [n, K]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def unflat(y: Tensor, x: Tensor) -> Tensor:
    """Rows y [n, out] in the leading shape of x [..., K]."""
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])
