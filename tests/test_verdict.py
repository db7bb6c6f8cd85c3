"""``qc verify DIR --target vllm-ascend``: mutated checkpoints get the verdict of the server's own classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qc.compiler.targets.verdict import Verdict, verdict
from tests import contract
from tests.checkpoints import save_float, save_quantized

DESCRIPTION = "quant_model_description.json"
WEIGHTS = "quant_model_weights.safetensors"
L0 = "model.layers.0"
O, DOWN = f"{L0}.self_attn.o_proj", f"{L0}.mlp.down_proj"  # noqa: E741
GATE, UP, Q, K, V = (
    f"{L0}.mlp.gate_proj",
    f"{L0}.mlp.up_proj",
    f"{L0}.self_attn.q_proj",
    f"{L0}.self_attn.k_proj",
    f"{L0}.self_attn.v_proj",
)


@dataclass
class Files:
    """A checkpoint in memory: config, description, tensors; a mutation changes them."""

    config: dict[str, Any]
    description: dict[str, Any]
    tensors: dict[str, Tensor]

    def put(self, name: str, tensor: Tensor, kind: str | None = None) -> None:
        """Store a tensor, and a type of it if one is given."""
        self.tensors[name] = tensor
        if kind is not None:
            self.description[name] = kind


def types(name: str) -> str:
    """A type of every kind that the safe intersection has, in one model."""
    if ".mlp." in name:
        return "W8A8" if "layers.0" in name and "down" not in name else "W4A4_DYNAMIC"
    return {"0": "W8A8_DYNAMIC", "1": "W4A4_FLATQUANT_DYNAMIC"}[name.split(".")[2]]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with types of every kind."""
    source = save_float(tmp_path_factory.mktemp("float"), "qwen3", head_dim=32, tie_word_embeddings=False)
    return save_quantized(source, tmp_path_factory.mktemp("good") / "out", types)


Mutation = Callable[[Files], object]


def retype(name: str, kind: str | None) -> Mutation:
    def change(files: Files) -> None:
        if kind is None:
            del files.description[f"{name}.weight"]
        else:
            files.description[f"{name}.weight"] = kind

    return change


def tensor(name: str, change: Callable[[Tensor], Tensor] | None) -> Mutation:
    def mutate(files: Files) -> None:
        if change is None:
            del files.tensors[name]
        else:
            files.tensors[name] = change(files.tensors[name]).contiguous()

    return mutate


def cache(scale: Tensor, offset: Tensor | None = None, switched: bool = True) -> Mutation:
    def mutate(files: Files) -> None:
        if switched:
            files.description["kv_cache_type"] = "C8"
        files.put(f"{K}.kv_cache_scale", scale, "C8")
        files.put(f"{V}.kv_cache_scale", torch.ones(64), "C8")
        if offset is not None:
            files.put(f"{K}.kv_cache_offset", offset, "C8")

    return mutate


MUTATIONS: dict[str, tuple[Mutation, str, str, str]] = {
    "no description": (lambda f: f.description.clear(), "refuses", "A1", DESCRIPTION),
    "no entry of a linear": (retype(O, None), "refuses", "A3", f"{O}.weight"),
    "no entry of a shard": (retype(K, None), "refuses", "A3", f"{K}.weight"),
    "k of another type": (retype(K, "W8A8"), "refuses", "A4", f"{L0}.self_attn.qkv_proj"),
    "gate float, up not": (retype(GATE, "FLOAT"), "refuses", "A4", f"{L0}.mlp.gate_up_proj"),
    "a type of FP8": (retype(DOWN, "WFP8AFP8_DYNAMIC"), "refuses", "A3", DOWN),
    "W4A16 on a linear": (retype(DOWN, "W4A16"), "refuses", "A3", DOWN),
    "W4A8 on a linear": (retype(DOWN, "W4A8_DYNAMIC"), "refuses", "A10", DOWN),
    "a scale per group": (
        tensor(f"{DOWN}.weight_scale", lambda t: t.repeat(1, 4)), "refuses", "A5", f"{DOWN}.weight_scale",
    ),
    "a flat scale": (tensor(f"{O}.weight_scale", lambda t: t.flatten()), "refuses", "A5", f"{O}.weight_scale"),
    "a weight of other sizes": (tensor(f"{O}.weight", lambda t: t[:, :-8]), "refuses", "A5", f"{O}.weight"),
    "two int4 to a byte": (tensor(f"{DOWN}.weight", lambda t: t[::2]), "refuses", "A5", f"{DOWN}.weight"),
    "factors of another split": (
        tensor("model.layers.1.self_attn.q_proj.left_trans", lambda t: torch.eye(4, dtype=t.dtype)),
        "refuses", "A5", "model.layers.1.self_attn.q_proj.left_trans",
    ),
    "an online rotation of QuaRot": (
        lambda f: f.put(f"{O}.heads_rotation", torch.eye(4)), "refuses", "A6", f"{O}.heads_rotation",
    ),
    "a low-rank branch": (
        lambda f: f.put(f"{O}.svd_lowrank_l1", torch.ones(4, 128)), "refuses", "A6", f"{O}.svd_lowrank_l1",
    ),
    "a zero point": (
        lambda f: f.put(f"{O}.weight_zero_point", torch.zeros(64, 1)), "refuses", "A6", f"{O}.weight_zero_point",
    ),
    "a norm of another width": (
        tensor("model.norm.weight", lambda t: t[:8]), "refuses", "A5", "model.norm.weight",
    ),
    "quantization_config left behind": (
        lambda f: f.config.update(quantization_config={"quant_method": "ascend"}), "refuses", "A1", "config.json",
    ),
    "cache scales without the switch": (
        cache(torch.ones(64), switched=False), "refuses", "A11", f"{K}.kv_cache_scale",
    ),
    "one cache scale per tensor": (cache(torch.ones(1)), "refuses", "A11", f"{K}.kv_cache_scale"),
    "a quantized embedding": (
        retype("model.embed_tokens", "W8A8_DYNAMIC"), "refuses", "A3", "model.embed_tokens.weight",
    ),
    "no weight_offset": (tensor(f"{O}.weight_offset", None), "ruins", "A5", f"{O}.weight_offset"),
    "no weight_scale": (tensor(f"{DOWN}.weight_scale", None), "ruins", "A5", f"{DOWN}.weight_scale"),
    "no deq_scale": (tensor(f"{UP}.deq_scale", None), "ruins", "A5", f"{UP}.deq_scale"),
    "no weight": (tensor(f"{UP}.weight", None), "ruins", "A5", f"{UP}.weight"),
    "no clip ratio": (
        tensor("model.layers.1.self_attn.o_proj.clip_ratio", None),
        "ruins", "A5", "model.layers.1.self_attn.o_proj.clip_ratio",
    ),
    "no norm": (tensor("model.norm.weight", None), "ruins", "A5", "model.norm.weight"),
    "no head": (tensor("lm_head.weight", None), "ruins", "A5", "lm_head.weight"),
    "a float weight under an integer type": (
        tensor(f"{O}.weight", lambda t: t.bfloat16() * 0.01), "ruins", "A5", f"{O}.weight",
    ),
    "float16 with float32 deq_scale": (
        lambda f: f.config.update(dtype="float16"), "ruins", "A5", f"{UP}.deq_scale",
    ),
    "an input offset of a half": (
        tensor(f"{GATE}.input_offset", lambda t: t.float() + 0.5), "ruins", "A5", f"{GATE}.input_offset",
    ),
    "gate and up with other input scales": (
        tensor(f"{UP}.input_scale", lambda t: t * 2), "ruins", "A8", f"{L0}.mlp.gate_up_proj.input_scale",
    ),
    "q and k with other factors": (
        tensor("model.layers.1.self_attn.k_proj.right_trans", lambda t: -t),
        "ruins", "A8", "model.layers.1.self_attn.qkv_proj.right_trans",
    ),
    "a bias that the model has not": (
        lambda f: f.put(f"{O}.bias", torch.ones(64).bfloat16(), "FLOAT"), "ruins", "A6", f"{O}.bias",
    ),
    "a cache offset": (cache(torch.ones(64), torch.ones(64)), "ruins", "A11", f"{K}.kv_cache_offset"),
    "nothing": (lambda f: None, "loads", "", ""),
    "float32 scales, as ModelSlim writes them": (
        tensor(f"{GATE}.input_scale", lambda t: t.float()), "loads", "", "",
    ),
    "a float32 input offset, as ModelSlim writes it": (
        tensor(f"{GATE}.input_offset", lambda t: t.float()), "loads", "", "",
    ),
    "a cache": (cache(torch.ones(64), torch.zeros(64)), "loads", "", ""),
    "norm biases that are described": (
        lambda f: f.put("model.norm.bias", torch.ones(64).bfloat16(), "FLOAT"), "loads", "", "",
    ),
}  # fmt: skip
"""What is done to a checkpoint, what the server does with it, and the rule and tensor that say so."""

SILENT: dict[str, tuple[Mutation, str, str]] = {
    "bits of deq_scale in a bfloat16 model": (
        tensor(f"{UP}.deq_scale", lambda t: t.view(torch.int32).to(torch.int64)), "A5", f"{UP}.deq_scale",
    ),
    "a norm of integers": (
        tensor("model.norm.weight", lambda t: (50 * t).to(torch.int8)), "A5", "model.norm.weight",
    ),
    "a scale of 0 of a cache": (cache(torch.zeros(64)), "A9", f"{K}.kv_cache_scale"),
    "an int4 of 8": (tensor(f"{DOWN}.weight", lambda t: torch.full_like(t, 8)), "A9", f"{DOWN}.weight"),
    "a scale of 0": (tensor(f"{O}.weight_scale", torch.zeros_like), "A9", f"{O}.weight_scale"),
    "a scale of inf": (tensor(f"{O}.weight_scale", lambda t: t / 0), "A9", f"{O}.weight_scale"),
    "offsets of a symmetric type": (tensor(f"{O}.weight_offset", torch.ones_like), "A9", f"{O}.weight_offset"),
    "a clip ratio above one": (
        tensor("model.layers.1.self_attn.o_proj.clip_ratio", lambda t: t + 1),
        "A9", "model.layers.1.self_attn.o_proj.clip_ratio",
    ),
}  # fmt: skip
"""Numbers that the server's classes take without a word, as ``loads`` of the harness shows: ours are the only ones to
say so."""


def write(source: Path, out: Path, mutate: Mutation) -> Path:
    """A copy of a checkpoint, mutated."""
    shutil.copytree(source, out)
    files = Files(
        json.loads((out / "config.json").read_text()),
        json.loads((out / DESCRIPTION).read_text()),
        load_file(out / WEIGHTS),
    )
    mutate(files)
    (out / "config.json").write_text(json.dumps(files.config))
    save_file(files.tensors, out / WEIGHTS)
    if files.description:
        (out / DESCRIPTION).write_text(json.dumps(files.description))
    else:
        (out / DESCRIPTION).unlink()
    return out


@pytest.fixture(scope="module")
def corpus(good: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every mutated checkpoint."""
    folder = tmp_path_factory.mktemp("corpus")
    named = {name: case[0] for name, case in MUTATIONS.items()} | {
        name: case[0] for name, case in SILENT.items()
    }
    return {name: write(good, folder / str(i), mutate) for i, (name, mutate) in enumerate(named.items())}


@pytest.fixture(scope="module")
def theirs(corpus: dict[str, Path]) -> dict[str, contract.Verdict]:
    """What the server's classes say of all of them."""
    found = contract.judge(list(corpus.values()))
    return {name: found[path] for name, path in corpus.items()}


def shown(found: Verdict) -> set[tuple[str, str, str]]:
    return {(one.outcome, one.rule, one.tensor) for one in found.findings}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_has_its_verdict_with_rule_and_tensor(name: str, corpus: dict[str, Path]) -> None:
    _, word, rule, where = MUTATIONS[name]
    found = verdict(corpus[name], "vllm-ascend==0.23")
    assert found.word == word, found
    if rule:
        assert (word, rule, where) in shown(found), found


@pytest.mark.parametrize("name", SILENT)
def test_numbers_that_cannot_be_are_found(name: str, corpus: dict[str, Path]) -> None:
    _, rule, where = SILENT[name]
    found = verdict(corpus[name], "vllm-ascend==0.23")
    assert shown(found) == {("ruins", rule, where)}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_servers_classes_agree(name: str, theirs: dict[str, contract.Verdict]) -> None:
    errors, _ = theirs[name]
    assert bool(errors) == (MUTATIONS[name][1] != "loads"), errors
    rules = {"refuses": RAISES, "ruins": SILENTLY}
    if errors:
        said = " ".join(errors)
        assert any(word in said for word in rules[MUTATIONS[name][1]]), said


RAISES = (
    "Error", "no such parameter", "shape", "no description entry", "Not Found", "never reads", "only FLOAT",
    "without top-level", "runtime views",
)  # fmt: skip
"""Words of the harness for what stops the server."""
SILENTLY = ("LOSSY", "uninitialised", "not detected", "last one loaded wins", "silently", "never subtracted")
"""Its words for what does not."""


def test_the_servers_classes_take_what_is_silent(theirs: dict[str, contract.Verdict]) -> None:
    assert {name: theirs[name][0] for name in SILENT} == {name: [] for name in SILENT}
