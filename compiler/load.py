"""Load: a directory of safetensors becomes a model that runs, integer linears included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from .capture_experts import register as register_experts
from .capture_grids import check_grids_run
from .capture_model import constants, is_hub_id, subject
from .compressed_library import NAME as COMPRESSED_TENSORS
from .config_dtype import config_dtype
from .description import block_by, description_of, own_block
from .errors import Refused
from .load_compressed import load_compressed
from .load_modules import QuantizedCheckpoint, check_exact, install
from .shards import read_json
from .weights import Checkpoint


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model in a directory, in evaluation mode on CPU, read from its files alone.

    A directory with ``quant_model_description.json``, or with a ``quantization_config`` of qc in its config.json,
    gets integer linears that compute what the served ones compute. One of compressed-tensors is loaded through
    transformers and the library of that name, and computes what they do. Any other is an ordinary float checkpoint.

    Args:
        path: A checkpoint directory, or a hub id.
        dtype: In which floats run; default, the one that config.json says. Integers and scales stay as they
            are stored, so do not call ``model.to(dtype)`` afterwards.

    Raises:
        Refused: No such directory; a tensor that is missing, unknown, of another shape or dtype; a type that
            is not in ``runtime.formats``; a quantized tensor where the model has no linear of its own; a checkpoint
            of compressed-tensors without that library; one of another method.
    """
    register_experts()
    given = subject(path, config=None, trust_remote_code=False, ours=True)
    path = given.path or Path(path)
    if block_by(COMPRESSED_TENSORS, path) is not None:
        return load_compressed(path, dtype)
    description = description_of(path)
    stored = stored_dtype(path)
    chosen = replace(given, dtype=dtype or stored, stored=None)
    model = chosen.on_meta(None, experts=None)
    if not isinstance(model, PreTrainedModel):
        raise Refused(f"{path}: {type(model).__name__} is no transformers model")
    buffers = constants(model, chosen)
    grids = frozenset[str]()
    if description is not None:
        name_of, grids = install(model, path, description, stored, dtype or stored)
        source: Checkpoint = QuantizedCheckpoint(path, model, name_of)
        check_exact(model, source)
    else:
        source = Checkpoint(path, model)
    model.load_state_dict(_in_dtype(model, source.load(source.names())), assign=True, strict=True)
    for name, buffer in buffers.items():
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = buffer
    model.tie_weights()
    if (path / "generation_config.json").is_file():
        model.generation_config = _generation_config(path)
    model.requires_grad_(False).eval()
    if grids:
        check_grids_run(model, grids, str(path))
    return model


def _generation_config(path: Path) -> GenerationConfig:
    """How a model generates where nobody says, from the file beside it."""
    try:
        return GenerationConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Refused(
            f"{path / 'generation_config.json'} cannot be read ({reason}); copy that of the float model there, or"
            " remove it"
        ) from error


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a directory, as transformers makes it; Refused where it can read none."""
    here = Path(path).is_dir()
    if not here and not is_hub_id(str(path)):
        raise Refused(f"{path}: no such directory; give one that holds the files of a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=here, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        if Path(path).is_dir() and not any((*Path(path).glob("tokenizer*"), *Path(path).glob("*.model"))):
            reason = "it has no tokenizer files"
        else:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Refused(
            f"{path}: no tokenizer that can be read ({reason}); copy the tokenizer files of the model there"
        ) from error


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype of the model that a directory was made for: integer linears hold some of their tensors in it."""
    return config_dtype(own_block(path), read_json(path / "config.json")) or torch.float32


def _in_dtype(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the dtypes that the model has."""
    return {name: tensors[name].to(wanted.dtype) for name, wanted in model.state_dict().items()}
