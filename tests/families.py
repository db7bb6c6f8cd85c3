"""Tiny random configs of many model families, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)

WINDOW = 5
COMMON: Any = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
GQA: Any = COMMON | {"num_key_value_heads": 2}


def smollm2() -> PretrainedConfig:
    """Llama with tied embeddings and three query heads to a key head, as SmolLM2 has."""
    return LlamaConfig(
        **GQA | {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8, "tie_word_embeddings": True}
    )


DENSE: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GQA),
    "smollm2": smollm2,
    "qwen2": lambda: Qwen2Config(**GQA),
    "qwen3": lambda: Qwen3Config(**GQA, head_dim=24),
    "mistral": lambda: MistralConfig(**GQA, sliding_window=WINDOW, head_dim=16),
    "phi3": lambda: Phi3Config(**GQA),
    "gemma": lambda: GemmaConfig(**GQA | {"tie_word_embeddings": True}, head_dim=16),
    "olmo": lambda: OlmoConfig(**GQA),
    "cohere": lambda: CohereConfig(**GQA | {"tie_word_embeddings": True}, use_qk_norm=True),
    "stablelm": lambda: StableLmConfig(**GQA, qk_layernorm=True),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON),
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=96, word_embed_proj_dim=64),
}
"""Families that must be captured bit for bit."""

FURTHER: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=96, n_embd=64, n_layer=3, n_head=4, n_inner=96, n_positions=64, dtype="bfloat16"
    ),
    "gemma2": lambda: Gemma2Config(
        **GQA | {"tie_word_embeddings": True}, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **GQA | {"tie_word_embeddings": True, "num_hidden_layers": 7},
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
    ),
    "mixtral": lambda: MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **GQA | {"head_dim": 16},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        mlp_only_layers=[1],
    ),
}
"""Families that are captured as well, some with experts."""

ALL = DENSE | FURTHER


def build(config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model with random weights; gains, biases and scales are random too, around what they start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_((noise * (2.0 / parameter.shape[-1]) ** 0.5).to(parameter.dtype))
    return model


def batch(
    vocabulary: int = 96, shape: tuple[int, int] = (3, 11), *, seed: int = 0, padded: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids, and a mask with left padding in the first row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, shape, generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : shape[1] // 3] = 0
    return ids, mask


def gpt_oss(path: Path) -> None:
    """Save a tiny GPT-OSS, whose experts lie in stacks on disk."""
    config = GptOssConfig(
        **GQA | {"num_hidden_layers": 2}, num_local_experts=4, num_experts_per_tok=2, head_dim=16,
        sliding_window=5, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    build(config).save_pretrained(path)
