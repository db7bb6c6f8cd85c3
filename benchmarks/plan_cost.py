"""Plan a 32B model without its weights: seconds and peak memory.

``python -m benchmarks.plan_cost`` runs ``qc plan`` on a folder that holds nothing but a config of Qwen3-32B's
shape. The bars: under 60 s and 1.5 GB.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from .measure import run_qc
from .records import record, table

SECONDS, BYTES = 60.0, 1.5e9
PASSES = "iter_smooth,quarot,autoround"
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 64,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}


def main() -> int:
    """Measure, print, record; 1 when a bar is missed."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        run = run_qc("plan", folder, "--passes", PASSES, "--scheme", "auto")
    met = run.seconds < SECONDS and run.peak < BYTES
    row = {
        "model": "Qwen3-32B's shape, 64 layers",
        "seconds": run.seconds,
        "bar s": SECONDS,
        "peak GB": run.peak / 1e9,
        "bar GB": BYTES / 1e9,
        "met": met,
    }
    table(f"qc plan --passes {PASSES} --scheme auto, no weights on disk", [row])
    record("plan_cost", row)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
