"""``qc::routed`` and ``qc::combined``: what stands before and behind the experts of a mixture.

Between them every expert is a handful of ordinary linears, so that laws, patterns, edits, statistics and
quantizers need to know nothing of mixtures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("qc::routed", mutates_args=())
def routed(x: Tensor, index: Tensor, expert: int, every: bool = False) -> Tensor:
    """The rows of x [n, h] that are sent to one expert, [rows, h] in the order of x; all of them if ``every``.

    ``index`` [n, k] int64 names the experts of a row; one that is not there (a sentinel beyond the last) gets
    no rows. The number of rows depends on values; in a graph they are counted as the n that they may be.
    """
    return x.clone() if every else x[(index == expert).any(-1)]


@routed.register_fake
def _(x, index, expert, every=False):
    return torch.empty_like(x)


@torch.library.custom_op("qc::combined", mutates_args=())
def combined(index: Tensor, weight: Tensor, ys: Sequence[Tensor]) -> Tensor:
    """The sum of what the experts made of their rows, each times its weight; returns [n, h].

    ``index`` [n, k] and ``weight`` [n, k] are those of the router. ``ys[e]`` holds the rows [rows, h] of
    expert e as ``routed`` gave them, or all n rows, of which those that were sent there count.
    """
    return mixed(index, weight, ys)


def mixed(index: Tensor, weight: Tensor, ys: Sequence[Tensor]) -> Tensor:
    """What ``qc::combined`` computes, differentiable."""
    out = ys[0].new_zeros((index.shape[0], ys[0].shape[-1]))
    for expert, y in enumerate(ys):
        row, place = torch.where(index == expert)
        if row.numel() == 0:
            continue
        if y.shape[0] == index.shape[0]:
            y = y[row]
        out = out.index_add(0, row, (y * weight[row, place, None]).to(out.dtype))
    return out


@combined.register_fake
def _(index, weight, ys):
    return ys[0].new_empty((index.shape[0], ys[0].shape[-1]))


def _save_routed(ctx, inputs, output) -> None:
    x, index, ctx.expert, ctx.every = inputs
    ctx.save_for_backward(index)
    ctx.shape = x.shape


def _routed_backward(ctx, grad: Tensor):
    (index,) = ctx.saved_tensors
    if ctx.every:
        return grad.clone(), None, None, None
    dx = grad.new_zeros(ctx.shape)
    dx[(index == ctx.expert).any(-1)] = grad
    return dx, None, None, None


def _save_combined(ctx, inputs, output) -> None:
    index, weight, ys = inputs
    ctx.save_for_backward(index, weight, *ys)


def _combined_backward(ctx, grad: Tensor):
    index, weight, *ys = ctx.saved_tensors
    weight, *ys = (t.detach().requires_grad_() for t in (weight, *ys))
    with torch.enable_grad():
        out = mixed(index, weight, ys)
    dweight, *dys = torch.autograd.grad(out, (weight, *ys), grad, materialize_grads=True, allow_unused=True)
    return None, dweight, dys


routed.register_autograd(_routed_backward, setup_context=_save_routed)
combined.register_autograd(_combined_backward, setup_context=_save_combined)

ROUTED = torch.ops.qc.routed.default
COMBINED = torch.ops.qc.combined.default
