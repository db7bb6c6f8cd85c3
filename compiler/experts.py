"""``qc::experts``: one op for a layer of gated experts, so that its two stacks of weights stay plain operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""The activations that an expert's gate may have, by the name that the op carries."""


def mix(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """What ``qc::experts`` computes, differentiable: expert after expert, each on the tokens routed to it."""
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, place = torch.where(index == expert)
        if token.numel() == 0:
            continue
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        y = F.linear(ACTIVATIONS[activation](gate) * up, down[expert])
        out = out.index_add(0, token, (y * weight[token, place, None]).to(out.dtype))
    return out


@torch.library.custom_op("qc::experts", mutates_args=())
def experts(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """The weighted sum over the experts that each token of x [n, h] was routed to; returns [n, h].

    ``index`` [n, k] int64 names the experts of a token (one beyond the last is none) and ``weight`` [n, k] says how
    much of each. Expert e is ``down[e] @ (act(gate) * up)`` with ``gate, up = gate_up[e] @ x``; ``gate_up`` is
    [experts, 2 * inner, h], ``down`` [experts, h, inner], ``activation`` a name of ``ACTIVATIONS``.
    """
    return mix(x, index, weight, gate_up, down, activation)


@experts.register_fake
def _(x, index, weight, gate_up, down, activation):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    x, index, weight, gate_up, down, activation = inputs
    ctx.save_for_backward(x, index, weight, gate_up, down)
    ctx.activation = activation


def _backward(ctx, grad: Tensor):
    x, index, weight, gate_up, down = ctx.saved_tensors
    x, weight, gate_up, down = (t.detach().requires_grad_() for t in (x, weight, gate_up, down))
    with torch.enable_grad():
        out = mix(x, index, weight, gate_up, down, ctx.activation)
    dx, dweight, dgate_up, ddown = torch.autograd.grad(
        out, (x, weight, gate_up, down), grad, materialize_grads=True
    )
    return dx, None, dweight, dgate_up, ddown, None


experts.register_autograd(_backward, setup_context=_save)
