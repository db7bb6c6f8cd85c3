"""The smallest config of a causal language model type that still has one layer of every kind it knows.

Sizes are chosen by what a key of the config means, the same for all types; what a type asks for beside that
stands in `SPECIAL`, each with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Every model type that transformers registers with a causal language model."""

VOCABULARY, WINDOW, POSITIONS, EXPERTS = 96, 8, 128, 4

RULES: tuple[tuple[str, int], ...] = (
    (r".*token_(id|index)|.*_index|unk_index|mask_index", 1),
    (r".*vocab.*", VOCABULARY),
    (
        r".*(max_position|n_positions|n_ctx|max_seq_len|model_max_length|max_length|context_length|_positions).*",
        POSITIONS,
    ),
    (
        r"(sliding_|attention_|local_attention_|keep_)?window(_size|_len)?|sliding_window_size|"
        r"local_attention|.*_chunk_length|attention_chunk_size", WINDOW,
    ),
    (r"(mamba_|linear_)?chunk_size|.*inference_chunksize", 8),
    (r"num_hidden_layers|n_layers?|num_layers|num_blocks|(num_)?(de|en)coder_layers", 2),
    (r"num_layers_per_stack|n_layers_per_attn_res_block", 1),
    (r"(num_)?(key_value|kv)_heads|num_key_value_heads|swa_num_key_value_heads|num_query_groups", 2),
    (
        r".*num_(en|de)?coder_attention_heads|(swa_)?num_attention_heads|n_heads?|num_heads|"
        r"(en|de)coder_attention_heads|attention_heads|index_n_heads|n_mamba_heads", 4,
    ),
    (r"(linear_)?num_(key|value)_heads|linear_num_(key|value)_heads|linear_num_heads", 4),
    (r"mamba_(n|num)_heads", 8),
    (r"mamba_d_head|mamba_head_?dim", 16),
    (
        r"(swa_|global_|linear_(key_|value_)?|attention_|qk_)?head_dim|dim_head|d_head|kv_channels|"
        r"attention_head_(size|dim)|v_head_dim|qk_nope_head_dim|index_head_dim|d_kv", 16,
    ),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"kv_lora_rank|o_lora_rank|.*_rank", 16),
    (r"q_lora_rank", 32),
    (r"moe_intermediate_size|expert_ffn_hidden_size|.*expert.*_intermediate_size", 32),
    (
        r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|dim_ff|dff|n_inner|feed_forward_size|intermediate_size_mlp)",
        128,
    ),
    (
        r"hidden_size(_global)?|adapter_(in|out)_dim|adapter_input_size|d_model|n_embd|emb_dim|"
        r"embedding_dim|embedding_size|word_embed_proj_dim|.*embedding_size|attention_hidden_size|"
        r"lru_width|d_inner|backbone_hidden_size|dim_model_base|.*embed_dim|router_hidden_size|"
        r"prompt_mid_dim", 64,
    ),
    (r"(n_routed_|num_local_|moe_num_|num_)?experts|n_routed_experts|num_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|o_groups", 1),
    (r"first_k_dense_replace|num_dense_layers|n_shared_experts|num_shared_experts", 1),
    (r"(mamba_)?d_state|state_size|ssm_state_size|mamba_d_state", 8),
    (r"index_topk(_blocks)?|hidden_size_per_layer_input", 8),
    (r"index_block_size", 4),
    (r"rel_extent", 32),
    (r"zero_expert_num", 2),
)  # fmt: skip
"""Value of an integer by the whole name of its key, the first that fits."""

ABSENT = {
    "head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
    "indexer_budget": 8, "indexer_compress_ratio": 2,
}  # fmt: skip
"""Values of keys that a default config leaves empty, though its model needs them."""

SPECIAL: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "afmoe": ({"num_hidden_layers": 2}, "a dense layer and one with experts"),
    "cohere_compass_text": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        "its default has no rope parameters",
    ),
    "dbrx": (
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": EXPERTS, "moe_top_k": 2, "hidden_size": 64},
            "n_heads": 4, "num_key_value_heads": 2,
        },
        "its parts are configs of their own",
    ),
    "falcon_h1": ({"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16}, "heads and width have to agree"),
    "gemma3n_text": (
        {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": 128,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        },
        "the last layers share keys and values of earlier ones of their kind",
    ),
    "jamba": (
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
        "a layer that scans and one of attention",
    ),
    "lfm2_moe": ({"layer_types": ["conv", "full_attention"]}, "its default names no layer types"),
    "mamba2": ({"num_heads": 8, "head_dim": 16}, "heads and width have to agree"),
    "musicgen": ({"num_codebooks": 1}, "one stream of tokens"),
    "musicgen_melody": ({"num_codebooks": 1}, "one stream of tokens"),
    "nemotron_h": (
        {"mamba_num_heads": 8, "mamba_head_dim": 16, "num_hidden_layers": 4,
         "layers_block_type": ["mamba", "moe", "attention", "mlp"]},
        "one layer of each kind that it knows",
    ),
    "recurrent_gemma": (
        {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2}, "a layer that scans and one of attention",
    ),
    "reformer": (
        {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8], "num_hidden_layers": 2,
         "attn_layers": ["local", "lsh"]},
        "positions have factors",
    ),
    "xlstm": ({"num_hidden_layers": 2, "num_blocks": 2, "num_heads": 4, "qk_dim_factor": 1.0, "embedding_dim": 64},
              "two names for one size"),
    "xmod": ({"default_language": "en_XX"}, "its adapters are named by language"),
    "zamba": (
        {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2,
         "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_dt_rank": 4,
         "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
        "the block of attention is shared by layers, at least two",
    ),
    "zamba2": (
        {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
         "hybrid_layer_ids": [2, 5], "attention_hidden_size": 128, "attention_head_dim": 32, "kv_channels": 16,
         "n_mamba_heads": 8, "mamba_headdim": 16},
        "the block of attention is shared by layers, at least two",
    ),
}  # fmt: skip
"""What a type needs beside the rules, and why."""


DECODERS = {"musicgen": "musicgen_decoder", "musicgen_melody": "musicgen_melody_decoder"}
"""Types that are registered with the config of a whole pipeline, while their model takes that of its decoder."""


def small_config(model_type: str) -> PretrainedConfig:
    """A config of a type whose model has thousands of parameters, in bfloat16."""
    cls = CONFIG_MAPPING[DECODERS.get(model_type, model_type)]
    special, _ = SPECIAL.get(model_type, ({}, ""))
    values = shrunk(_defaults(cls), special)
    config = cls(**values)
    text = config.get_text_config(decoder=True)
    text.is_decoder = True
    config.is_decoder = True
    config.is_encoder_decoder = text.is_encoder_decoder = False
    config.dtype = "bfloat16"
    return config


def _defaults(cls: type[PretrainedConfig]) -> dict[str, Any]:
    try:
        return _plain(cls())
    except ValueError:  # a type whose default config is not valid: everything it needs stands in SPECIAL
        return {}


def _plain(config: PretrainedConfig) -> dict[str, Any]:
    return {
        key: value
        for key, value in config.to_dict().items()
        if not key.startswith("_") and key not in DROPPED
    }


DROPPED = (
    "model_type", "transformers_version", "dtype", "torch_dtype", "architectures", "per_layer_config", "qk_head_dim",
    "id2label", "label2id",
)  # fmt: skip
"""Keys that follow from others."""


def shrunk(values: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a config made small; those of nested configs too."""
    small = {key: _small(key, value) for key, value in values.items()}
    depth = next((values[k] for k in DEPTHS if isinstance(values.get(k), int)), None)
    few = next((small[k] for k in DEPTHS if isinstance(values.get(k), int)), 2)
    kinds = values.get("layer_types") or values.get("layers_block_type")
    if isinstance(kinds, list) and kinds:
        chosen = one_of_each(kinds)
        few = max(2, len(chosen))
        chosen = (chosen * 2)[:few]
        for key in KINDS:
            if values.get(key):
                small[key] = chosen
        small |= {k: few for k in DEPTHS if isinstance(values.get(k), int)}
    for key, value in values.items():
        if (
            isinstance(value, list)
            and depth
            and len(value) == depth
            and key not in ("layer_types", "layers_block_type")
        ):
            small[key] = (
                list(one_of_each(value) * few)[:few]
                if all(not isinstance(v, float) for v in value)
                else value[:few]
            )
    for key in ("num_key_value_heads", "num_kv_heads", "n_head_kv"):
        heads = values.get("num_attention_heads")
        if isinstance(values.get(key), int) and heads:
            small[key] = 4 if values[key] == heads else 1 if values[key] == 1 else 2
    small |= {k: v for k, v in ABSENT.items() if k in values and values[k] is None}
    if "first_k_dense_replace" in values:
        small["first_k_dense_replace"] = 1
    if values.get("qk_rope_head_dim") and values.get("head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]
    return small | dict(special)


KINDS = ("layer_types", "layers_block_type")
DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "num_decoder_layers",
)  # fmt: skip


def one_of_each(values: list[Any]) -> list[Any]:
    """Every value once, in the order of first use."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _small(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        if "model_type" not in value:
            return dict(value)
        inner = {k: v for k, v in value.items() if k not in DROPPED and not k.startswith("_")}
        return shrunk(inner, {}) | ({"model_type": value["model_type"]} if "model_type" in value else {})
    if type(value) is not int or value < 1:
        return value
    for pattern, small in RULES:
        if re.fullmatch(pattern, key):
            return min(small, value)
    return value
