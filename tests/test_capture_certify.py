"""A capture certifies itself: what is wrong on purpose is caught, and the twin is the model made narrow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx
from transformers import Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config

import qc.compiler.capture as capture_module
import qc.compiler.capture_attention as capture_attention
from qc.compiler.canon import op_name
from qc.compiler.capture import capture, capture_subject
from qc.compiler.capture_model import subject
from qc.compiler.certify import _announce, certified
from qc.compiler.errors import NotEquivalent, Refused
from qc.compiler.execute import run
from qc.compiler.narrow import Shrunk, shrunk_configs
from qc.compiler.program import Program
from qc.compiler.twin import difference, outline
from tests.families import ALL, batch, build
from tests.programs import captured

pytestmark = pytest.mark.broad

SOME = ["gemma2", "opt"]


@pytest.mark.parametrize(
    "family",
    [f if f in SOME else pytest.param(f, marks=pytest.mark.slow) for f in ALL],
)
def test_a_capture_is_certified_on_a_twin(family: str) -> None:
    program = capture(ALL[family]())
    twin = program.twin
    assert twin is not None
    assert not [note for note in program.notes if "certified" in note or "attention" in note]
    assert twin.dtype == program.dtype
    assert all(twin.source.dtype(name) == torch.float32 for name in twin.source.names())
    assert not difference(outline(program, len(twin.blocks)), outline(twin, len(twin.blocks)))
    for name, leaf in twin.leaves.items():
        if leaf.kind == "norm" and "weight" in leaf.parameters:
            assert twin.source.load([f"{name}.weight"])[f"{name}.weight"].std() > 0.05
    ids, mask = batch(32, (2, 20))
    with torch.no_grad():
        wide = run(twin, ids, mask, dtype=torch.float64)[mask.bool()]
        plain = run(twin, ids, mask, dtype=torch.float32)[mask.bool()]
    assert (wide - plain).norm() <= 1e-4 * wide.norm()
    assert torch.isfinite(wide).all()


def test_a_dropped_soft_cap_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    own = capture_attention.attend_as_qc

    def forward(*args: Any, softcap: float | None = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    monkeypatch.setattr(capture_attention, "attend_as_qc", forward)
    monkeypatch.setattr(capture_module, "ATTENTIONS", (capture_attention.NAME,))
    with pytest.raises(NotEquivalent, match="not the model's own"):
        capture(ALL["gemma2"]())


def test_what_the_op_cannot_say_is_captured_as_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose code takes our mask for another kind (DeepSeek-V4) is captured with its own attention."""
    own = capture_attention.attend_as_qc

    def forward(*args: Any, softcap: float | None = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    monkeypatch.setattr(capture_attention, "attend_as_qc", forward)
    program = capture(ALL["gemma2"]())
    assert program.attention == "eager"
    assert "not captured as qc: the attention that was captured is not the model's own" in program.notes[0]


def test_a_mask_without_its_window_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    own = capture_attention.explicit_mask

    def mask(*args: Any, **kwargs: Any) -> Any:
        from transformers.masking_utils import causal_mask_function

        return own(*args, **kwargs | {"mask_function": causal_mask_function})

    monkeypatch.setattr(capture_attention, "explicit_mask", mask)
    monkeypatch.setattr(capture_module, "ATTENTIONS", (capture_attention.NAME,))
    with pytest.raises((NotEquivalent, Refused)):
        capture(ALL["mistral"]())


def forgotten_op(program: Program, name: str) -> Program:
    """The program without the first op of that name in each block."""
    program = program.fork()
    for block in program.blocks:
        node = next(n for n in program.nodes(block) if op_name(n) == name)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        program.graph.erase_node(node)
    return program


@pytest.mark.parametrize(("family", "op"), [("llama", "neg"), ("gpt2", "tanh")])
def test_a_graph_that_is_not_the_model_is_caught(family: str, op: str) -> None:
    def broken(what: Any) -> Program:
        return forgotten_op(capture_subject(what), op)

    program = captured(family)
    what = subject(ALL[family](), config=None, trust_remote_code=False)
    with pytest.raises(NotEquivalent, match="not the model"):
        certified(forgotten_op(program, op), what, None, broken)


def test_a_twin_of_another_architecture_is_refused() -> None:
    program = captured("llama")
    what = subject(ALL["llama"](), config=None, trust_remote_code=False)

    def other(given: Any) -> Program:
        return forgotten_op(capture_subject(given), "neg")

    with pytest.raises(Refused, match="its text differs"):
        certified(program, what, None, other)


def test_a_module_in_memory_gets_a_twin_of_its_class() -> None:
    model = build(ALL["smollm2"]())
    program = capture(model)
    assert program.twin is not None
    assert type(program.twin.config) is LlamaConfig
    assert program.twin.ties == program.ties


BIG: list[tuple[Callable[[], Any], int]] = [
    (
        lambda: LlamaConfig(
            num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8, eos_token_id=31999
        ),
        2,
    ),
    (lambda: Qwen2Config(num_hidden_layers=6, use_sliding_window=True, max_window_layers=3), 4),
    (lambda: Gemma2Config(num_hidden_layers=4), 3),
]


@pytest.mark.parametrize(("make", "layers"), BIG)
def test_a_twin_is_narrow_and_has_every_kind_of_layer(make: Callable[[], Any], layers: int) -> None:
    config = make()
    config.dtype = "bfloat16"
    program = capture(config, certify=False)
    shrunk = next(iter(shrunk_configs(program)))
    now = shrunk.config
    assert now.num_hidden_layers == shrunk.layers == layers
    assert now.vocab_size == 256
    assert now.hidden_size <= config.hidden_size // 8
    assert now.hidden_size % now.num_attention_heads == 0
    assert now.hidden_size // now.num_attention_heads >= 8
    groups = config.num_attention_heads // config.num_key_value_heads
    assert now.num_attention_heads // now.num_key_value_heads == groups
    assert getattr(now, "sliding_window", None) in (None, 8)


def test_many_wide_heads_do_not_keep_a_twin_wide() -> None:
    config = Qwen3Config(
        hidden_size=5120, intermediate_size=25600, num_attention_heads=64, num_key_value_heads=8,
        head_dim=128, num_hidden_layers=2,
    )  # fmt: skip
    twin = capture(config).twin
    assert twin is not None
    now = twin.config
    assert (now.num_attention_heads, now.num_key_value_heads) == (16, 2)
    assert now.num_attention_heads * now.head_dim <= 512
    assert sum(torch.Size(twin.source.shape(name)).numel() for name in twin.source.names()) < 2e6


def test_what_certifying_costs_is_announced() -> None:
    program = captured("llama")
    (note,) = _announce(program, Shrunk(program.config, 3, False))
    assert note.startswith("certified on 3 layers at full width with 0.0 GB")
    assert _announce(program, replace(Shrunk(program.config, 3, False), narrow=True)) == []
