"""Capture: every family's graph computes what the model computes, bit for bit, and shows its structure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import T5Config

from qc.compiler.canon import op_name, symbolic
from qc.compiler.capture import capture
from qc.compiler.errors import Refused
from qc.compiler.execute import inputs_of, outputs_of, parameters_of, run
from qc.compiler.program import Norm, Program
from qc.compiler.show.text import text
from tests.families import ALL, DENSE, WINDOW, batch, build
from tests.programs import captured

pytestmark = pytest.mark.broad

SHAPES = [((3, 11), True), ((1, 1), False), ((2, 33), True)]
EXACT = [*DENSE, "gpt2", "gemma2", "gemma3"]


def op_nodes(program: Program, name: str) -> list[fx.Node]:
    return [n for n in program.graph.nodes if op_name(n) == name]


@pytest.mark.parametrize("family", EXACT)
def test_the_graph_is_the_model_bit_for_bit(family: str) -> None:
    model, program = build(ALL[family]()), captured(family)
    assert len(program.blocks) == model.config.num_hidden_layers
    assert program.notes == ()
    for shape, padded in SHAPES:
        ids, mask = batch(shape=shape, padded=padded)
        with torch.no_grad():
            want = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            got = run(program, ids, mask, dtype=torch.bfloat16)
        rows = mask.bool()
        assert torch.equal(got[rows], want[rows])
    check_structure(program)


def check_structure(program: Program) -> None:
    """What everybody who reads a program relies on."""
    program.graph.lint()
    names = dict(program.root.named_modules())
    before = 0
    for node in program.graph.nodes:
        assert node.meta["part"] >= before
        before = node.meta["part"]
        if node.op != "output":
            assert "val" in node.meta
        if node.op == "call_module":
            assert node.target in names
            assert program.leaf(node) is not None
        if symbolic(node):
            assert all(s.meta["part"] == node.meta["part"] or not symbolic(s) for s in node.all_input_nodes)
    for block in program.blocks:
        assert len(outputs_of(program, block)) == 1
        origins = {node.meta["part"] for node in inputs_of(program, block)}
        assert origins <= {0, block.index - 1}
        assert parameters_of(program, block)
    assert op_nodes(program, "attention")
    assert {leaf.kind for leaf in program.leaves.values()} == {"linear", "norm", "embedding"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_linears_and_the_model_bit_for_bit(family: str) -> None:
    model, program = build(ALL[family]()), captured(family)
    model.set_experts_implementation("eager")
    ids, mask = batch()
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(run(program, ids, mask, dtype=torch.bfloat16)[mask.bool()], want[mask.bool()])
    layers = {"mixtral": 3, "qwen3_moe": 2}[family]
    assert len(op_nodes(program, "routed")) == 4 * layers
    assert len(op_nodes(program, "combined")) == layers
    assert len([name for name in program.leaves if ".experts." in name]) == 4 * 3 * layers
    assert program.notes == ()
    assert len({block.kind for block in program.blocks}) == {"mixtral": 1, "qwen3_moe": 2}[family]


def norms(family: str) -> set[Norm]:
    return {leaf.norm for leaf in captured(family).leaves.values() if leaf.norm is not None}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3", {Norm(False, 0.0, False, True, 1e-6, 64), Norm(False, 0.0, False, True, 1e-6, 24)}),
        ("gemma", {Norm(False, 1.0, False, True, 1e-6, 64)}),
        ("olmo", {Norm(True, 0.0, False, False, 1e-5, 64)}),
        ("cohere", {Norm(True, 0.0, False, True, 1e-5, 64), Norm(True, 0.0, False, True, 1e-5, 16)}),
        ("opt", {Norm(True, 0.0, True, True, 1e-5, 64)}),
    ],
)
def test_norms_are_told_apart_by_what_they_compute(family: str, expected: set[Norm]) -> None:
    assert norms(family) == expected


def test_kinds_of_blocks_do_not_depend_on_which_mask_feeds_them() -> None:
    program = captured("gemma2")
    assert [block.kind for block in program.blocks] == [0, 0, 0]
    masks = [inputs_of(program, block)[3] for block in program.blocks]
    assert masks[0] is masks[2]
    assert masks[0] is not masks[1]
    assert all(node.args[5] == 50.0 for node in op_nodes(program, "attention"))


def test_a_tied_head_is_known_by_the_owner_of_its_storage() -> None:
    program = captured("smollm2")
    assert program.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert program.leaves["model.embed_tokens"].kind == "embedding"
    assert parameters_of(program, program.parts[-1]) == ("model.norm.weight", "model.embed_tokens.weight")


def test_a_scaled_embedding_shows_its_scale() -> None:
    program = captured("gemma")
    (table,) = [n for n in program.graph.nodes if n.target == "model.embed_tokens"]
    assert [op_name(user) for user in table.users] == ["mul"]
    assert float(program.constants["model.embed_tokens.embed_scale"]) == 8.0


def test_a_conv1d_is_a_transposed_linear() -> None:
    program = captured("gpt2")
    leaf = program.leaves["transformer.h.0.attn.c_attn"]
    assert (leaf.kind, leaf.transposed, leaf.parameters["weight"]) == ("linear", True, (64, 192))
    assert not program.leaves["lm_head"].transposed


def test_activations_stay_inline() -> None:
    program = captured("llama")
    assert len(op_nodes(program, "silu")) == 3


def test_a_config_alone_has_shapes_and_no_weights() -> None:
    program = capture(ALL["llama"](), certify=False)
    name = "model.layers.0.mlp.up_proj.weight"
    assert program.source.shape(name) == (96, 64)
    assert program.source.dtype(name) == torch.bfloat16
    with pytest.raises(Refused, match="config alone"):
        program.source.load([name])


def test_a_float32_model_is_captured_as_bfloat16_and_runs_in_float32() -> None:
    model = build(ALL["gemma"](), dtype=torch.float32)
    program = capture(model, certify=False)
    assert program.dtype == torch.bfloat16
    assert program.source.dtype("model.norm.weight") == torch.float32
    ids, mask = batch()
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(run(program, ids, mask, dtype=torch.float32)[mask.bool()], want[mask.bool()])


def test_constants_of_a_float32_checkpoint_are_not_rounded() -> None:
    config = ALL["gemma"]()
    config.hidden_size, config.dtype = 72, torch.float32
    program = capture(config, certify=False)
    scale = program.constants["model.embed_tokens.embed_scale"]
    assert scale.dtype == torch.float32
    assert float(scale) == pytest.approx(72**0.5, rel=1e-7)


class Small(nn.Module):
    """A model of nobody's: names, wiring and signature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.steps = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3))
        self.out = nn.Linear(8, 20, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for step in self.steps:
            x = x + torch.relu(step(x))
        return self.out(x)


def test_a_module_with_example_inputs() -> None:
    model = Small().eval()
    ids = torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(0))
    program = capture(model, example={"input_ids": ids})
    assert [block.name for block in program.blocks] == ["steps.0", "steps.1", "steps.2"]
    assert {block.kind for block in program.blocks} == {0}
    with torch.no_grad():
        assert torch.equal(run(program, ids, dtype=torch.float32), model(ids))
    assert program.twin is not None
    assert not torch.equal(program.twin.source.load(["out.weight"])["out.weight"], model.out.weight)


def test_fewer_traced_layers_give_the_same_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    import qc.compiler.capture as module

    def all_layers(*_: object) -> fx.Graph:
        raise RuntimeError("trace every layer")

    monkeypatch.setattr(module, "expand", all_layers)
    assert text(captured("gemma2")) == text(capture(ALL["gemma2"](), certify=False))


def test_layers_that_are_alike_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing all of them gives the same graph, so that nothing else would tell that this no longer works."""
    import qc.compiler.capture as module

    expanded: list[str] = []
    own = module.expand

    def expand(graph: fx.Graph, stack: str, model: nn.Module) -> fx.Graph:
        expanded.append(stack)
        return own(graph, stack, model)

    monkeypatch.setattr(module, "expand", expand)
    capture(ALL["llama"](), certify=False)
    assert expanded == ["model.layers"]


class LooksAtIndex(nn.Module):
    """A layer whose arithmetic depends on its index, so no layer stands for another."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) / (self.index + 1)


def test_a_layer_that_looks_at_its_index_is_traced_itself() -> None:
    model = Small().eval()
    model.steps = nn.ModuleList(LooksAtIndex(i) for i in range(4))
    ids = torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(0))
    program = capture(model, example={"input_ids": ids})
    assert [block.kind for block in program.blocks] == [0, 1, 2, 3]
    with torch.no_grad():
        assert torch.equal(run(program, ids, dtype=torch.float32), model(ids))


def test_capture_leaves_the_model_alone() -> None:
    model = build(ALL["llama"]())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    state = torch.get_rng_state()
    capture(model, certify=False)
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def write(path: Path, config: Mapping[str, object]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_what_cannot_be_captured_says_why(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    quantized = ALL["llama"]().to_dict() | {"quantization_config": {"quant_method": "gptq"}}
    remote = {"model_type": "of_my_own", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    cases: list[tuple[object, str]] = [
        (empty, "no config.json"),
        (file, "is a file"),
        (tmp_path / "nothing", "no such directory"),
        (tmp_path / "broken", "not valid JSON"),
        (write(tmp_path / "untyped", {"hidden_size": 8}), "no model_type"),
        (write(tmp_path / "unknown", {"model_type": "of_my_own"}), "cannot be read by transformers"),
        (write(tmp_path / "remote", remote), "--trust-remote-code"),
        (write(tmp_path / "quantized", quantized), r"quantized already \(quant_method gptq\)"),
        (write(tmp_path / "t5", T5Config().to_dict()), "encoder-decoder"),
        (Small(), "needs example inputs"),
    ]
    for model, reason in cases:
        with pytest.raises(Refused, match=reason):
            capture(model)  # pyright: ignore[reportArgumentType]


class DataDependent(Small):
    """A model whose Python code branches on values."""

    def forward(self, input_ids: Tensor) -> Tensor:
        if bool(input_ids.sum() > 3):
            input_ids = input_ids + 1
        return super().forward(input_ids)


def test_a_model_that_branches_on_values_is_refused() -> None:
    with pytest.raises(Refused, match=r"test_capture\.py:\d+ in forward: if bool\(input_ids\.sum\(\) > 3\)"):
        capture(DataDependent(), example={"input_ids": torch.zeros(2, 4, dtype=torch.int64)})


class NoStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.table(input_ids))


def test_a_model_without_a_stack_of_blocks_is_refused() -> None:
    with pytest.raises(Refused, match="no stack of decoder blocks"):
        capture(NoStack(), example={"input_ids": torch.zeros(2, 4, dtype=torch.int64)})


def test_a_hub_id_that_cannot_be_fetched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(Refused, match="ConnectionError: no network"):
        capture("org/name")


def test_a_hub_id_is_its_snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    build(ALL["llama"]()).save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    program = capture("org/name", certify=False)
    assert program.path == str(tmp_path)
    assert program.source.load(["model.norm.weight"])["model.norm.weight"].shape == (64,)


def test_a_window_reaches_the_mask() -> None:
    program = captured("mistral")
    prologue = text(program, part=program.parts[0])
    assert f", {WINDOW})" in prologue
    wide = captured("llama")
    assert f", {WINDOW})" not in text(wide, part=wide.parts[0])


class Tables(Small):
    """A model that makes its tables in an order that says nothing."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        place = torch.arange(input_ids.shape[1], device=input_ids.device)[:, None]
        made = {name: place * {"a": 2.0, "b": 3.0}[name] for name in self.order}
        for step, name in zip(self.steps, "aba", strict=True):
            x = x + torch.relu(step(x) + made[name].to(x.dtype))
        return self.out(x)


def test_the_order_in_which_a_prologue_was_traced_says_nothing() -> None:
    """A set of layer types is gone through in the order of hashes, which differs from process to process."""
    example = {"input_ids": torch.zeros(2, 6, dtype=torch.int64)}
    one, other = (text(capture(Tables(order), example=example, certify=False)) for order in ("ab", "ba"))
    assert one == other
