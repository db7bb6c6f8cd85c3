"""The op ``leaky::rectify``, its law, and a Llama whose MLP has it."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qc
from qc.compiler.laws import Blocks, Map, Passes

SLOPE = 0.1


@torch.library.custom_op("leaky::rectify", mutates_args=())
def rectify(x: Tensor) -> Tensor:
    """x where it is positive, a tenth of it elsewhere."""
    return torch.where(x > 0, x, SLOPE * x)


@rectify.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def law(program: qc.Program, node: fx.Node, operand: fx.Node, what: Map) -> Passes | Blocks:
    """rectify(s x) = s rectify(x) for s > 0."""
    return Passes() if what is Map.SCALE else Blocks("a leaky rectifier lets only positive scales through")


class LeakyMLP(nn.Module):
    """``down(rectify(up(x)))``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(rectify(self.up_proj(x)))


class LeakyForCausalLM(LlamaForCausalLM):
    """A Llama with that MLP in every layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = LeakyMLP(config)
