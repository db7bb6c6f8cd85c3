"""Modules whose code loops over the length of the input: opaque between their linears, open in batch and length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, PretrainedConfig, Qwen3NextConfig, RwkvConfig

from benchmarks.random_llama import character_tokenizer
from qc.compiler.capture import capture
from qc.compiler.compile import Options, compile
from qc.compiler.execute import run
from qc.compiler.load import load
from qc.compiler.program import Program
from qc.compiler.stretch import STRETCH
from tests.families import GQA
from tests.programs import captured, relative

pytestmark = pytest.mark.broad

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "dtype": "bfloat16"}
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "mamba": lambda: MambaConfig(**SMALL, state_size=4, time_step_rank=4, conv_kernel=4),
    "rwkv": lambda: RwkvConfig(
        **SMALL, rescale_every=0, context_length=64, attention_hidden_size=32, intermediate_size=64,
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        **GQA | {"num_hidden_layers": 2}, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip
LINEARS = {
    "mamba": {"in_proj", "x_proj", "out_proj"},  # of dt_proj its code uses the weight and calls nothing
    "rwkv": {"key", "receptance", "value", "output"},
    "qwen3_next": {"in_proj_qkvz", "in_proj_ba", "out_proj"},
}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[str, torch.nn.Module, Program]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[request.param]()).eval()
    return request.param, model, capture(model)


def test_any_length_computes_what_the_model_computes(case: tuple[str, torch.nn.Module, Program]) -> None:
    _, model, program = case
    for size in ((1, 2), (2, 5), (1, 131)):  # longer than the chunks of a chunked scan
        ids = torch.randint(3, 90, size, generator=torch.Generator().manual_seed(size[1]))
        with torch.no_grad():
            want = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            got = run(program, ids, dtype=torch.bfloat16)
        assert relative(got.double(), want.double()) < 2e-2, size


def test_linears_stay_visible_beside_the_scan(case: tuple[str, torch.nn.Module, Program]) -> None:
    name, _, program = case
    beside = {
        str(node.target).rpartition(".")[2]
        for node in program.graph.nodes
        if program.leaf(node) is not None and any(source.target is STRETCH for source in node.all_input_nodes)
    }
    assert beside == LINEARS[name]


class Picky(nn.Module):
    """A module that asks for values: rows above zero go through one linear, the others through another."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(16, 16)
        self.high, self.low = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        out = torch.zeros_like(x)
        for mask, linear in ((x[..., 0] > 0, self.high), (x[..., 0] <= 0, self.low)):
            rows = mask.nonzero()
            for row in rows:
                out[row[0], row[1]] = linear(x[row[0], row[1]])
        return out


class Chooser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.steps = nn.ModuleList(Picky() for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        for step in self.steps:
            x = x + step(x)
        return self.out(x)


def test_a_module_that_asks_for_values_is_opaque_between_its_linears() -> None:
    torch.manual_seed(0)
    model = Chooser().eval()
    program = capture(model, example={"input_ids": torch.zeros(2, 5, dtype=torch.int64)})
    assert {name: known.linears for name, known in program.stretches.items()} == {
        f"steps.{i}": ("enter",) for i in range(2)
    }  # of the others the values decide on how many rows they run
    ids = torch.randint(32, (3, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(run(program, ids, dtype=torch.float32), model(ids), atol=1e-6)


def test_models_without_a_scan_have_no_stretch() -> None:
    for family in ("llama", "gemma2", "mixtral"):
        assert not captured(family).stretches


def test_it_is_quantized_and_read_back(case: tuple[str, torch.nn.Module, Program], tmp_path: Path) -> None:
    name, model, program = case
    result = compile(
        program, "linear_quant", tmp_path / "out",
        Options(scheme="w8a8", target="modelslim", tokenizer=character_tokenizer()),
    )  # fmt: skip
    swapped = {
        str(node.target).rpartition(".")[2] for node in result.plan.final.graph.nodes if "scheme" in node.meta
    }
    assert swapped >= LINEARS[name]
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model.float()(input_ids=ids, use_cache=False).logits
        got = load(tmp_path / "out", dtype=torch.float32)(input_ids=ids, use_cache=False).logits
    model.to(torch.bfloat16)
    assert 1e-4 < relative(got, want) < 0.1, name
