"""The plans that measured best here, by name. Numbers are those of docs/benchmarks.md."""

from __future__ import annotations

from ..compiler.named import Named

BEST_W8A8 = Named(
    "nearly the float model, everywhere in int8",
    "iter_smooth,linear_quant", "w8a8", "vllm-ascend", "w8a8", 1.008, 0.01155,
)  # fmt: skip
BEST_AUTO = Named(
    "half of the weights in four bits, for speed at little loss",
    "iter_smooth,flatquant,gptq", "auto", "vllm-ascend", "auto", 0, 0,
)  # fmt: skip
BEST_W4A4 = Named(
    "every linear of the blocks in four bits, weights and activations",
    "iter_smooth,flatquant,gptq", "w4a4", "vllm-ascend", "w4a4", 0, 0,
)  # fmt: skip
BEST_W4A16 = Named(
    "weights in four bits, in groups of 64, activations float",
    "autoround{iters=50}", "w4a16-g64", "modelslim", "w4a16-g64", 1.091, 0.1131,
)  # fmt: skip
