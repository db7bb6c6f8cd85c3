"""The plans that measured best here, by name. Numbers are those of docs/benchmarks.md."""

from __future__ import annotations

from ..compiler.named import Named

BEST_W8A8 = Named(
    "nearly the float model, everywhere in int8",
    "iter_smooth,linear_quant", "w8a8", "vllm-ascend", "w8a8", 1.008, 0.01155,
)  # fmt: skip
BEST_AUTO = Named(
    "half of the weights in four bits, for speed at little loss",
    "iter_smooth,flatquant,autoround", "auto", "vllm-ascend", "auto", 1.102, 0.1121,
)  # fmt: skip
BEST_W4A4 = Named(
    "every linear of the blocks in four bits, weights and activations",
    "iter_smooth,flatquant,autoround", "w4a4", "vllm-ascend", "w4a4", 1.252, 0.2264,
)  # fmt: skip
BEST_W4A16 = Named(
    "weights in four bits, in groups of 64, activations float",
    "autoround{iters=50}", "w4a16-g64", "modelslim", "w4a16-g64", 1.072, 0.09709,
)  # fmt: skip
SMOOTHQUANT_O1 = Named(
    "SmoothQuant O1: one scale per weight tensor, one per token",
    "smooth_quant,linear_quant", "w8a8-pt", "vllm-ascend", "smoothquant-o1", 1.0726, 0.06772,
)  # fmt: skip
SMOOTHQUANT_O2 = Named(
    "SmoothQuant O2: one scale per weight tensor, one per activation tensor, found while the model runs",
    "smooth_quant,linear_quant", "w8a8-dynamic-tensor-pt", "modelslim", "smoothquant-o2", 1.7621, 0.57315,
)  # fmt: skip
SMOOTHQUANT_O3 = Named(
    "SmoothQuant O3: one scale per weight tensor, one fixed scale per activation",
    "smooth_quant,linear_quant", "w8a8-static-symmetric-pt", "vllm-ascend", "smoothquant-o3", 2.0882, 0.7525,
)  # fmt: skip
ZEROQUANT = Named(
    "ZeroQuant: weights in groups, one scale per token",
    "linear_quant", "w8a8-g64", "modelslim", "zeroquant", 1.0299, 0.0282,
)  # fmt: skip
LLM_INT8 = Named(
    "LLM.int8(): outlier channels in float, the others in int8",
    "outlier_channels,linear_quant", "w8a8", "modelslim", "llm-int8", 1.0189, 0.0163,
)  # fmt: skip
SPQR = Named(
    "SpQR: 1 % of the weights in float, the others in four bits, in groups of 64 with offsets",
    "spqr", "w4a16-g64-asym", "modelslim", "spqr", 1.0554, 0.06434,
)  # fmt: skip
OUTLIER_SUPPRESSION = Named(
    "Outlier Suppression: gains moved into weights, fixed ranges that cut outliers",
    "fuse_norms,linear_quant{act_method=histogram}", "w8a8-static", "vllm-ascend", "outlier-suppression",
    1.4685, 0.39954,
)  # fmt: skip
AWQ = Named(
    "AWQ: channels scaled for weights alone, scale and clip searched",
    "awq,linear_quant{weight_method=clip}", "w4a16-g64", "modelslim", "w4a16/awq", 1.2113, 0.17691,
)  # fmt: skip
QUAROT_GPTQ = Named(
    "QuaRot with online rotations, and GPTQ, behind a smoothing",
    "iter_smooth,quarot{online=true},gptq", "w4a4", "vllm-ascend", "w4a4/quarot-online/gptq", 1.8514, 0.62074,
)  # fmt: skip
