"""Importance of tokens: how much an error in the output of a linear moves the output of its block."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiler.view import BlockView

SMALLEST = 1e-12
"""The mean square of a token below which its relative error is not counted."""


def relative_error(got: Tensor, want: Tensor) -> Tensor:
    """Square error of every token [batch, seq, hidden] over its own mean square, averaged; float32, differentiable.

    Tokens whose hidden state is huge (the first of a window, above all) weigh as much as all others.
    """
    want = want.float()
    size = want.square().mean(-1, keepdim=True).clamp(min=SMALLEST)
    return ((got.float() - want).square() / size).mean()


def norm(x: Tensor) -> Tensor:
    """Length of every vector along the last axis [...], float32."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def token_importance(view: BlockView, names: Collection[str], where: str) -> list[dict[str, Tensor]]:
    """Per microbatch and linear: weights [batch · seq], float32, of mean 1 over all microbatches.

    The weight of token t at linear l estimates ``|| d (y / |y|) / d (output of l at t) ||²``, y the output of
    the block with float weights and ``|y|`` held as it is: one backward pass of a random y' with E[y' y'ᵀ] = I
    (Hutchinson's estimate of the trace of the Gauss-Newton matrix of ``relative_error``).

    Source: output-aware weighting of the layer-wise objective as in GuidedQuant (arXiv 2505.07004), for the
    error of the block instead of the model's loss.
    """
    assert view.forward is not None
    generator = view.generator(f"{where}/importance")
    found: list[dict[str, Tensor]] = []
    for index in range(view.batches):
        outputs: dict[str, Tensor] = {}

        def hook(
            name: str, x: Tensor, weight: Tensor, bias: Tensor | None, kept: dict[str, Tensor] = outputs
        ) -> Tensor:
            y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            if name not in names:
                return y
            kept[name] = y if y.requires_grad else y.detach().requires_grad_()
            return kept[name]

        with torch.enable_grad():
            got = view.forward(hook, index)
            size = norm(got.detach()).square_().div_(got.shape[-1]).clamp_(min=SMALLEST).sqrt_()
            probe = torch.randn(got.shape, generator=generator).to(size).div_(size[..., None])
            grads = torch.autograd.grad(got, list(outputs.values()), probe.to(got.dtype))
        found.append({name: norm(g).square_().flatten() for name, g in zip(outputs, grads, strict=True)})
    for name in found[0]:
        rows = sum(weights[name].numel() for weights in found)  # none for an expert that nothing is sent to
        mean = sum(float(weights[name].sum()) for weights in found) / max(rows, 1)
        for weights in found:
            weights[name] = weights[name] / max(mean, torch.finfo(torch.float32).tiny)
    return found
