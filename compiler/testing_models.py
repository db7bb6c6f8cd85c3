"""Tiny random models on which a pass is tried: several families, their tokenizer, and one in which nothing matches."""

from __future__ import annotations

import contextlib
import io
import string
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from . import registry
from .capture import capture
from .errors import Refused
from .program import Program

SIZES: Mapping[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {**SIZES, "tie_word_embeddings": True},
    "qwen3": {**SIZES, "tie_word_embeddings": False},
    "gemma2": {**SIZES, "sliding_window": 16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **{k: SIZES[k] for k in list(SIZES)[-5:]},
             "vocab_size": 96},
    "qwen3_moe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}  # fmt: skip
"""Type of a model in transformers to the sizes of a tiny one.

Tied and untied heads, norms of queries and keys, gains of ``1 + w`` behind every sublayer, LayerNorm with biases and
weights that are stored the other way round, experts.
"""
CALIBRATION = "the quick brown fox jumps over the lazy dog while the cat sleeps on a mat. " * 8
HOMES: list[tempfile.TemporaryDirectory[str]] = []
"""Directories of what is written once; they go with the process."""


@cache
def home() -> Path:
    """A directory that lives as long as the process."""
    HOMES.append(tempfile.TemporaryDirectory(prefix="qc-testing-"))
    return Path(HOMES[0].name)


@cache
def calibration() -> Path:
    """A file of calibration text."""
    file = home() / "calibration.txt"
    file.write_text(CALIBRATION, encoding="utf-8")
    return file


@cache
def characters() -> Any:
    """A tokenizer of single characters, with the ids of ``SIZES``."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_letters, *string.digits, " ", ".", ",", "\n"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def checkpoint(family: str) -> Path:
    """A directory with a tiny random model of a family, in bfloat16, and a tokenizer.

    Raises:
        Refused: There is no such family.
    """
    if family not in FAMILIES:
        raise Refused(registry.unknown("family", family, FAMILIES))
    config = AutoConfig.for_model(family, **FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():  # gains and biases that are not all alike
            if parameter.dim() < 2:
                nn.init.normal_(parameter, mean=float("norm" in name or "ln_" in name), std=0.2)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of progress
        model.save_pretrained(home() / family)
    characters().save_pretrained(home() / family)
    return home() / family


@cache
def tiny(family: str) -> Program:
    """The program of a tiny random checkpoint of a family; nobody edits it in place."""
    return capture(checkpoint(family), certify=False)


class Bend(nn.Module):
    """A block that no pattern knows: ``x + gain tanh(x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape [batch, length, 16]."""
        return x + self.gain * torch.tanh(x)


class Bare(nn.Module):
    """An embedding, blocks without linears, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(96, 16), nn.Linear(16, 96)
        self.layers = nn.ModuleList(Bend() for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, 96]."""
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@cache
def bare() -> Program:
    """A model in whose blocks nothing matches."""
    return capture(Bare(), example={"input_ids": torch.zeros(1, 4, dtype=torch.long)})
