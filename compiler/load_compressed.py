"""Load a checkpoint of compressed-tensors as its own consumers do: transformers and the library of that name."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from .capture_experts import stacks_of
from .compressed_library import NAME, check_installed
from .errors import Refused


def load_compressed(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model in a directory of compressed-tensors, in evaluation mode on CPU.

    Weights become floats when they are loaded, and linears put their activations on the library's grids. The logits are
    those of ``from_pretrained``, bit for bit; in another ``dtype`` than the stored one, experts run in that dtype too.

    Args:
        path: The directory, of qc or of another tool.
        dtype: In which the model runs; default, the one that config.json says.

    Raises:
        Refused: No library; a block that the library does not take; a tensor that is missing, unknown or of another
            shape, where transformers would warn and go on.
    """
    check_installed(str(path))
    try:
        with _quiet():
            model, told = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # transformers, pydantic and the library raise what they like
        raise _refused(path, error) from error
    _check_complete(path, told)
    try:
        with _quiet():
            model.hf_quantizer.compressor.decompress_model(model)  # else the first call does
    except Exception as error:
        raise _refused(path, error) from error
    for module in model.modules():
        for stack in stacks_of(module):  # experts come in the dtype of their scales, whatever was asked for
            weights = module.get_parameter(stack.name)
            weights.data = weights.data.to(model.dtype)
    model.requires_grad_(False).eval()
    return model


def _refused(path: Path, error: Exception) -> Refused:
    reason = " ".join(str(error).split())[:300]
    return Refused(
        f"{path}: transformers does not load it ({type(error).__name__}: {reason}); qc verify {path} --target"
        f" {NAME} says what is wrong"
    )


def _check_complete(path: Path, told: dict[str, Any]) -> None:
    """Refuse what transformers would make up, or leave out."""
    for key, what in (
        ("missing_keys", "is in no file, and transformers would make it up at random"),
        ("unexpected_keys", "belongs to no part of the model, and transformers would leave it out"),
        ("mismatched_keys", "has another shape than the model's"),
    ):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in told.get(key) or ())
        if names:
            more = f" and {len(names) - 1} more alike" if names[1:] else ""
            raise Refused(f"{path}: {names[0]}{more} {what}; qc verify {path} --target {NAME} lists all")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and reports: what is wrong is refused."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
