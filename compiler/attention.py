"""``qc::attention``: one op for scaled dot-product attention, so that q, k and v arrive as plain operands.

The grouped heads are shared inside the op and its arithmetic is that of the reference implementation in the
dtype of its operands: bit-equal to PyTorch's fused attention in bfloat16 and float32, float64 throughout in
float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped(x: Tensor, groups: int) -> Tensor:
    """Repeat each key or value head ``groups`` times: [b, kv, t, d] to [b, kv * groups, t, d]."""
    if groups == 1:
        return x
    b, kv, t, d = x.shape
    return x[:, :, None].expand(b, kv, groups, t, d).reshape(b, kv * groups, t, d)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: a bool mask (True attends) becomes 0 and the least finite number."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention written out, with a soft cap on the scores and one sink logit per head; [b, h, s, d]."""
    groups = q.shape[1] // k.shape[1]
    k, v = grouped(k, groups), grouped(v, groups)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + additive(mask, scores.dtype)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return torch.matmul(F.softmax(scores, dim=-1)[..., :-1], v)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.matmul(F.softmax(scores, dim=-1, dtype=wide).to(q.dtype), v)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What ``qc::attention`` computes, differentiable; returns [b, s, h, d] contiguous."""
    if softcap is not None or sinks is not None:
        return explicit_attention(q, k, v, mask, scale, softcap, sinks).transpose(1, 2).contiguous()
    b, h, s, _ = q.shape
    kv = k.shape[1]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if s == 1 and h != kv and (mask is None or mask.shape[1] == 1):
        # One query token: its heads become rows of their key head, which is the kernel that decoding runs.
        out = F.scaled_dot_product_attention(q.reshape(b, kv, h // kv, -1), k, v, attn_mask=mask, scale=scale)
        return out.reshape(b, h, 1, v.shape[-1]).transpose(1, 2).contiguous()
    k, v = grouped(k, h // kv), grouped(v, h // kv)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).contiguous()


@torch.library.custom_op("qc::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of q [b, h, s, d] over k [b, kv, t, d] and v [b, kv, t, e]; returns [b, s, h, e].

    ``h`` is a multiple of ``kv``: query head i reads key head i // (h / kv). ``mask`` is bool (True attends)
    or added to the scores, and broadcasts to [b, h, s, t]; without one every query sees every key.
    ``softcap`` c turns scores into c tanh(scores / c); ``sinks`` [h] is one more logit per head that carries
    no value.
    """
    return attend(q, k, v, mask, scale, softcap, sinks).clone()


@attention.register_fake
def _(q, k, v, mask, scale, softcap=None, sinks=None):
    b, h, s, _ = q.shape
    return q.new_empty((b, s, h, v.shape[-1]))


def _save(ctx, inputs, output) -> None:
    q, k, v, mask, scale, softcap, sinks = inputs
    ctx.save_for_backward(q, k, v, mask, sinks)
    ctx.scale, ctx.softcap = scale, softcap


def _backward(ctx, grad: Tensor):
    q, k, v, mask, sinks = ctx.saved_tensors
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    sinks = None if sinks is None else sinks.detach().requires_grad_()
    with torch.enable_grad():
        out = attend(q, k, v, mask, ctx.scale, ctx.softcap, sinks)
    wanted = (q, k, v) if sinks is None else (q, k, v, sinks)
    dq, dk, dv, *dsinks = torch.autograd.grad(out, wanted, grad)
    return dq, dk, dv, None, None, None, dsinks[0] if dsinks else None


attention.register_autograd(_backward, setup_context=_save)
