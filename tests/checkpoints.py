"""Small checkpoints for tests: random models saved by transformers, and their round-to-nearest exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qc.runtime.formats import FORMATS
from qc.runtime.hadamard import random_hadamard
from qc.runtime.kronecker import fold, split
from qc.runtime.quantize import quantize, round_scale, scale_for, scale_offset_for
from qc.runtime.quantized import QuantizedLinear

WORDS = (
    "<unk>",
    "<s>",
    "</s>",
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "dog",
    "ran",
    "to",
    "its",
    "red",
)
TINY: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_float(
    path: Path,
    model_type: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    chat: bool = False,
    **options: Any,
) -> Path:
    """A random model of two layers with a tokenizer of a few words, as transformers saves it."""
    config = AutoConfig.for_model(model_type, **TINY | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():  # spread enough that logits differ from token to token
            torch.nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.5)
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = "{{ bos_token }} {% for m in messages %}{{ m['content'] }}{% endfor %} the"
    tokenizer.save_pretrained(path)
    return path


def pack_nearest(
    kind: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, group: int = 0, blocks: int = 1
) -> dict[str, Tensor]:
    """A linear rounded to nearest, as tensors on disk."""
    format = FORMATS[kind]
    extra: dict[str, Any] = {}
    weight = weight.float()
    if format.rotated:
        left, right = (random_hadamard(n, 1).to(dtype) for n in split(weight.shape[1] // blocks))
        weight, extra = fold(weight, left, right), {"left": left, "right": right}
    if format.act_scope in ("tensor", "mix"):
        scale, offset = scale_offset_for(torch.tensor([-4.0]), torch.tensor([4.5]), 8, dtype)
        extra = {"input_scale": scale, "input_offset": offset}
    absmax = weight.abs().unflatten(1, (-1, group or weight.shape[1])).amax(-1)
    scale = round_scale(scale_for(absmax, format.weight_bits), format.scale_dtype(dtype))
    return format.pack(
        QuantizedLinear(quantize(weight, scale, format.weight_bits), scale, bias, **extra), dtype
    )


def save_quantized(
    source: Path, path: Path, kind: str | Callable[[str], str], group: int = 0, blocks: int = 1
) -> Path:
    """The checkpoint ``source`` with every block linear rounded to nearest, in the ascendv1 layout."""
    path.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    stored = load_file(source / "model.safetensors")
    dtype = getattr(torch, json.loads((source / "config.json").read_text())["dtype"])
    tensors: dict[str, Tensor] = {}
    description: dict[str, Any] = {"version": "1.0.0", "group_size": group}
    for name, tensor in stored.items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith("_proj"):
            tensors[name], description[name] = tensor, "FLOAT"
        elif leaf == "weight":
            format = kind if isinstance(kind, str) else kind(name)
            packed = pack_nearest(format, tensor, stored.get(f"{prefix}.bias"), dtype, group, blocks)
            tensors |= {f"{prefix}.{key}": value for key, value in packed.items()}
            description |= {f"{prefix}.{key}": format for key in packed}
    rewrite(path, tensors, description)
    return path


def rewrite(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Store tensors and their description."""
    save_file(tensors, path / "quant_model_weights.safetensors")
    (path / "quant_model_description.json").write_text(json.dumps(description))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a quantized checkpoint."""
    description = json.loads((path / "quant_model_description.json").read_text())
    return load_file(path / "quant_model_weights.safetensors"), description
