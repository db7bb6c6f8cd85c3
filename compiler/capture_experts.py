"""Lay the experts of a transformers model out as linears of their own, and route its rows through them.

transformers holds the experts of a layer in stacks: ``gate_up_proj`` [experts, 2 * inner, h] and ``down_proj``
[experts, h, inner], perhaps transposed, with biases, or with gate and up rows interleaved. ``split_experts``
puts modules in their place: ``experts.E.gate_proj``, ``.up_proj`` and ``.down_proj``, each an ``nn.Linear``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from .capture_attention import NAME, Uncarried
from .experts import combined, routed

STACKS = "qc_stacks"
"""Attribute of a module whose experts are laid out: its stacks, as they were."""


@dataclass(frozen=True)
class Stack:
    """One stack of weights or biases of all experts of a layer, and the linears that it is split into."""

    name: str
    """Local name of the stack in the module of experts."""
    leaf: str
    """``weight`` or ``bias``."""
    shape: tuple[int, ...]
    linears: tuple[str, ...]
    """The linears of one expert that it holds, in the order of their rows."""
    transposed: bool
    """Whether a weight is stored as [in, out]."""
    interleaved: bool
    """Whether the rows of its linears alternate instead of following one another."""

    @property
    def experts(self) -> int:
        """How many experts it holds."""
        return self.shape[0]

    def piece(self, stack: Tensor, expert: int, linear: int) -> Tensor:
        """The weight [out, in] or bias [out] of one linear of one expert."""
        own = stack[expert].T if self.transposed and self.leaf == "weight" else stack[expert]
        count = len(self.linears)
        rows = own[linear::count] if self.interleaved else own.chunk(count)[linear]
        return rows.contiguous()

    def joined(self, pieces: list[list[Tensor]]) -> Tensor:
        """The inverse of ``piece``: the stack, from the pieces of every linear of every expert."""

        def one(rows: list[Tensor]) -> Tensor:
            whole = torch.stack(rows, 1).flatten(0, 1) if self.interleaved else torch.cat(rows)
            return whole.T if self.transposed and self.leaf == "weight" else whole

        return torch.stack([one(rows) for rows in pieces])


def stacks_of(module: nn.Module) -> tuple[Stack, ...]:
    """The stacks that a module of experts has, or had before it was split; nothing for any other module."""
    if hasattr(module, STACKS):
        return tuple(Stack(*fields) for fields in getattr(module, STACKS))
    if not all(
        hasattr(module, name) for name in ("has_gate", "is_transposed", "is_concatenated", "has_bias")
    ):
        return ()
    inner = ("gate_proj", "up_proj") if module.has_gate else ("up_proj",)
    found = []
    for name, linears in (
        ("gate_up_proj" if module.has_gate else "up_proj", inner),
        ("down_proj", ("down_proj",)),
    ):
        for suffix, leaf in (("", "weight"), ("_bias", "bias")):
            stack = module._parameters.get(name + suffix)
            if stack is not None:
                interleaved = len(linears) > 1 and not module.is_concatenated
                found.append(
                    Stack(
                        name + suffix,
                        leaf,
                        tuple(stack.shape),
                        linears,
                        bool(module.is_transposed),
                        interleaved,
                    )
                )
    return tuple(found)


def split_experts(model: nn.Module) -> None:
    """Put linears in the place of all stacks of experts of a model, in place; on meta nothing is copied."""
    for module in list(model.modules()):
        stacks = () if hasattr(module, STACKS) else stacks_of(module)
        if not stacks:
            continue
        experts = [nn.Module() for _ in range(stacks[0].experts)]
        for stack in stacks:
            whole = module._parameters.pop(stack.name)
            assert whole is not None
            for expert, place in zip(range(stack.experts), experts, strict=True):
                for i, linear in enumerate(stack.linears):
                    piece = _piece(stack, whole, expert, i)
                    if stack.leaf == "weight":
                        place.add_module(linear, _linear(piece))
                    else:
                        place.get_submodule(linear).register_parameter("bias", piece)
        for expert, place in enumerate(experts):
            module.add_module(str(expert), place)
        setattr(module, STACKS, tuple(tuple(vars(stack).values()) for stack in stacks))


def _piece(stack: Stack, whole: nn.Parameter, expert: int, linear: int) -> nn.Parameter:
    if whole.is_meta:  # a view would keep the whole alive in every copy of the model
        out, *rest = whole.shape[1:] if not stack.transposed or stack.leaf == "bias" else whole.shape[:0:-1]
        data = torch.empty((out // len(stack.linears), *rest), dtype=whole.dtype, device="meta")
    else:
        data = stack.piece(whole.data, expert, linear)
    return nn.Parameter(data, requires_grad=whole.requires_grad)


def _linear(weight: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


def _forward(module: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Experts that were split, on rows x [n, h] with the experts ``index`` [n, k] and their ``weight`` [n, k]."""
    stacks = stacks_of(module)
    if not hasattr(module, STACKS) or x.dim() != 2 or getattr(module, "_is_expert_parallel", False):
        raise Uncarried(f"{type(module).__name__} lays its experts out in another way")
    ys = []
    for expert in range(stacks[0].experts):
        own = module.get_submodule(str(expert))
        rows = routed(x, index, expert)
        if module.has_gate:
            y = module._apply_gate(_beside(own.gate_proj(rows), own.up_proj(rows), stacks[0].interleaved))
        else:
            y = module.act_fn(own.up_proj(rows))
        y = own.down_proj(y)
        ys.append(module.post_expert_norm(y) if module.has_post_expert_norm else y)
    return combined(index, weight, ys)


def _beside(gate: Tensor, up: Tensor, interleaved: bool) -> Tensor:
    """Gate and up channels [rows, 2 * inner] as the model's own gate expects them."""
    return torch.stack([gate, up], -1).flatten(-2) if interleaved else torch.cat([gate, up], -1)


def register() -> None:
    """Make ``experts_implementation="qc"`` known to transformers."""
    ExpertsInterface.register(NAME, _forward)


def use_experts(model: nn.Module, implementation: str) -> None:
    """Let a model's experts run as ``implementation``, split for our own; nothing for a model without experts."""
    if isinstance(model, PreTrainedModel) and model._can_set_experts_implementation():
        if implementation == NAME:
            split_experts(model)
        model.set_experts_implementation(implementation)
