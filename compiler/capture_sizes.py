"""What tensors the model of a ``config.json`` has, with their sizes: built on meta, without any weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from .capture_experts import register, stacks_of
from .capture_model import subject
from .errors import Refused
from .load_modules import renaming
from .shards import read_json


@dataclass(frozen=True)
class LinearShape:
    """One linear: sizes, and whether it has a bias in the float model."""

    out: int
    width: int
    """Input channels."""
    bias: bool
    transposed: bool = False
    """Whether its weight is stored as [in, out]."""


@dataclass(frozen=True)
class Sizes:
    """The tensors of a causal language model by their names in transformers, which are those of most checkpoints."""

    architecture: str
    linears: Mapping[str, LinearShape]
    """Every linear outside of mixtures, the head among them."""
    experts: Mapping[str, Mapping[str, LinearShape]]
    """Mixture to the linears that each of its experts has, by local name."""
    counts: Mapping[str, int]
    """Mixture to the number of its experts."""
    floats: Mapping[str, tuple[int, ...]]
    """Every other parameter and stored buffer: embeddings, norms, routers, stacks of experts."""
    ties: Mapping[str, str]
    """Parameters that are another one, with that one's name."""
    embeddings: frozenset[str]
    """Modules that are tables."""
    head: str
    """The linear that makes logits; empty where there is none."""
    name_of: Callable[[str], str]
    """From the name of a tensor on disk to that in the model."""


def model_on_meta(path: Path, trust_remote_code: bool = False) -> Any:
    """The model that ``path/config.json`` says, on meta; a ``quantization_config`` in it is passed over.

    Raises:
        Refused: transformers knows no such model, or it needs code that is not trusted.
    """
    register()
    raw = read_json(path / "config.json")
    if "model_type" not in raw:
        raise Refused(
            f"{path / 'config.json'} has no model_type, so transformers cannot tell what model it is."
        )
    config = _plain(path, raw, trust_remote_code) if raw.get("quantization_config") else None
    return subject(path, config=config, trust_remote_code=trust_remote_code).on_meta(None, experts=None)


def sizes_of(path: Path, trust_remote_code: bool = False) -> Sizes:
    """The sizes of ``model_on_meta``; Refused likewise."""
    return sizes_on_meta(model_on_meta(path, trust_remote_code))


def _plain(path: Path, raw: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """The config without what it says of quantization."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever it likes
        reason = " ".join(str(error).split())[:300]
        raise Refused(f"{path / 'config.json'} cannot be read by transformers: {reason}") from error
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def sizes_on_meta(model: nn.Module) -> Sizes:
    """The sizes of a model; its experts may be stacks or linears of their own."""
    linears: dict[str, LinearShape] = {}
    experts: dict[str, dict[str, LinearShape]] = {}
    counts: dict[str, int] = {}
    embeddings: set[str] = set()
    for name, module in model.named_modules():
        if stacks := stacks_of(module):
            counts[name] = stacks[0].experts
            experts[name] = _of_an_expert(stacks)
        elif isinstance(module, nn.Linear | Conv1D) and not any(
            f"{name}.".startswith(f"{e}.") for e in experts
        ):
            out, width = module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
            linears[name] = LinearShape(out, width, module.bias is not None, isinstance(module, Conv1D))
        elif isinstance(module, nn.Embedding):
            embeddings.add(name)
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            ties[name] = owner
    state = {
        k: tuple(v.shape) for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)
    }
    floats = {n: shape for n, shape in state.items() if n.rpartition(".")[0] not in linears}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    named = next((n for n, module in model.named_modules() if module is head), "") if head is not None else ""
    return Sizes(
        type(model).__name__,
        linears,
        experts,
        counts,
        floats,
        ties,
        frozenset(embeddings),
        named,
        renaming(model),
    )


def _of_an_expert(stacks: Any) -> dict[str, LinearShape]:
    found: dict[str, LinearShape] = {}
    for stack in stacks:
        for i, linear in enumerate(stack.linears):
            piece = stack.piece(torch.empty(stack.shape, device="meta"), 0, i)
            if stack.leaf == "weight":
                found[linear] = LinearShape(piece.shape[0], piece.shape[1], False)
            else:
                found[linear] = LinearShape(found[linear].out, found[linear].width, True)
    return found
