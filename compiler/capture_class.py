"""The class of transformers that a config is a model of, and the model built from it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel


def named_class(config: Any) -> type[PreTrainedModel] | None:
    """The class that a config's ``architectures`` name, where its type is not registered for causal models.

    Some checkpoints hold the text half of a larger model: the config has a type of its own, the class takes it.
    """
    names = getattr(config, "architectures", None) or ()
    found = getattr(transformers, names[0], None) if names and names[0].endswith("ForCausalLM") else None
    fits = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if fits and isinstance(config, found.config_class or ()) else None


def is_causal(config: Any) -> bool:
    """Whether transformers itself has a causal language model for a config."""
    return type(config) in AutoModelForCausalLM._model_mapping or named_class(config) is not None


def build(
    config: Any, dtype: torch.dtype | None, *, attention: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A causal language model of a config with its own random weights, on the default device."""
    config = copy.deepcopy(config)
    cls = None if type(config) in AutoModelForCausalLM._model_mapping else named_class(config)
    if cls is None:
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    return cls._from_config(config, dtype=dtype, attn_implementation=attention)
