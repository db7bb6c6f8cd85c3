"""Route a transformers model's experts through ``qc::experts``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

from .capture_attention import NAME, Uncarried
from .experts import ACTIVATIONS, experts

WANTED = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
"""Layout of the experts that ``qc::experts`` computes."""


def activation_name(function: Any) -> str:
    """The name under which the op knows an activation, found by comparing what it computes.

    Raises:
        Uncarried: It is none that the op knows.
    """
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    for name, known in ACTIVATIONS.items():
        if torch.allclose(function(x), known(x), rtol=1e-12, atol=1e-12):
            return name
    raise Uncarried(f"the experts have an activation of their own ({type(function).__name__})")


def _forward(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    where = type(module).__name__
    odd = [name for name, value in WANTED.items() if getattr(module, name) is not value]
    odd += [name for name in ("has_post_expert_norm", "_is_expert_parallel") if getattr(module, name, False)]
    if type(module)._apply_gate is not _default_apply_gate:  # pyright: ignore[reportAttributeAccessIssue]
        odd.append("a gate of its own")
    if odd:
        raise Uncarried(f"{where} lays its experts out in another way: {', '.join(odd)}")
    with unset_fake_temporarily(), disable_proxy_modes_tracing():  # a number, not a part of the trace
        activation = activation_name(module.act_fn)
    stacks = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
    return experts(x, index, weight, *stacks, activation)


def register() -> None:
    """Make ``experts_implementation="qc"`` known to transformers."""
    ExpertsInterface.register(NAME, _forward)


def use_experts(model: nn.Module, implementation: str) -> None:
    """Let a model's experts run as ``implementation``; nothing for a model without experts."""
    if isinstance(model, PreTrainedModel) and model._can_set_experts_implementation():
        model.set_experts_implementation(implementation)
