"""Llama-shaped checkpoints with random weights of any depth, written shard by shard, with a tokenizer."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = "".join(sorted(set(string.printable) - set(string.ascii_uppercase) - set("\x0b\x0c")))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama."""

    layers: int
    hidden: int = 1024
    intermediate: int = 4096
    vocabulary: int = 32_000
    heads: int = 16
    key_heads: int = 4

    @property
    def config(self) -> LlamaConfig:
        """The config of a bfloat16 checkpoint of this shape, its head not tied to its embedding."""
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )

    def layer(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of one decoder layer, by their names on disk."""
        key_width = self.hidden // self.heads * self.key_heads
        shapes = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_width, self.hidden),
            "self_attn.v_proj": (key_width, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {f"model.layers.{index}.{name}.weight": shape for name, shape in shapes.items()}

    @property
    def shards(self) -> list[dict[str, tuple[int, ...]]]:
        """One shard per layer, then embedding, last norm and head."""
        table = (self.vocabulary, self.hidden)
        ends = {
            "model.embed_tokens.weight": table,
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": table,
        }
        return [*(self.layer(index) for index in range(self.layers)), ends]


def write(folder: Path, shape: Shape, *, seed: int = 0) -> Path:
    """Write config, tokenizer and bfloat16 shards to `folder`; at most one shard is in memory. Returns it.

    Gains are around 1 with a few ten times as large, so that there are outliers to smooth.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    size = 0
    for index, shapes in enumerate(shape.shards, start=1):
        name = f"model-{index:05}-of-{len(shape.shards):05}.safetensors"
        tensors = {key: _random(dims, generator) for key, dims in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2), encoding="utf-8")
    shape.config.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, capitals made small: ids below 80, no files needed."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        noise = 1 + 0.2 * noise
        noise[:: max(1, shape[0] // 8)] *= 10
        return noise.to(torch.bfloat16)
    return noise.mul_(shape[-1] ** -0.5).to(torch.bfloat16)
