"""Mixtures of experts: every expert is linears like any others, from capture to the files and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from qc.compiler.capture import capture
from qc.compiler.capture_experts import Stack
from qc.compiler.execute import execute, in_turn
from qc.compiler.expert_weights import checkpoint
from qc.compiler.experts import combined, routed
from qc.compiler.load import load
from qc.compiler.observe import Observers
from qc.compiler.operand import Statistic
from qc.compiler.plan import make_plan
from qc.compiler.roles import mixtures, peers, routers
from qc.compiler.safetensors_io import read_header
from qc.compiler.verify import verify
from tests.families import gpt_oss
from tests.homes import Home, compiled, logits, tensors_of
from tests.plans import planned
from tests.programs import captured, relative

pytestmark = pytest.mark.broad

PASSES = "iter_smooth,quarot,linear_quant"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_what_is_routed_and_combined_is_the_sum_over_the_experts(
    n: int, k: int, experts: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    weight = torch.rand(n, k, generator=generator)
    index = torch.stack([torch.randperm(experts + 2, generator=generator)[:k] for _ in range(n)])
    matrices = torch.randn(experts, 4, 4, generator=generator)  # the last two experts of an index are none
    for every in (False, True):
        got = combined(index, weight, [routed(x, index, e, every) @ matrices[e] for e in range(experts)])
        want = torch.zeros(n, 4)
        for row in range(n):
            for place in range(k):
                if index[row, place] < experts:
                    want[row] += weight[row, place] * (x[row] @ matrices[index[row, place]])
        assert torch.allclose(got, want, atol=1e-6)


def test_the_ops_have_the_gradients_of_their_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([[0, 1], [1, 0], [0, 3], [1, 0], [0, 1]])  # expert 2 has no token, 3 is none
    shapes = [(5, 4), (5, 2), (3, 4, 4)]
    operands = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    for every in (False, True):

        def run(x: Tensor, weight: Tensor, matrices: Tensor, every: bool = every) -> Tensor:
            ys = [F.gelu(routed(x, index, e, every) @ matrices[e]) for e in range(3)]
            return combined(index, weight, ys)

        assert torch.autograd.gradcheck(run, tuple(operands))
    x, weight, _ = operands
    checks = ("test_schema", "test_autograd_registration")  # the number of rows depends on values
    torch.library.opcheck(routed, (x, index, 1), test_utils=checks)
    torch.library.opcheck(combined, (index, weight, [x[:5], x[:4], x[:0]]), test_utils=checks)


@given(
    st.integers(1, 3), st.sampled_from([("gate_proj", "up_proj"), ("down_proj",)]), st.booleans(), st.booleans(),
    st.sampled_from(["weight", "bias"]),
)  # fmt: skip
def test_a_stack_is_its_pieces(
    experts: int, linears: tuple[str, ...], transposed: bool, interleaved: bool, leaf: str
) -> None:
    rows = (4 * len(linears),) if leaf == "bias" else (4 * len(linears), 3)
    shape = (experts, *(rows[::-1] if transposed else rows))
    stack = torch.arange(float(torch.Size(shape).numel())).view(shape)
    held = Stack("stack", leaf, shape, linears, transposed, interleaved)
    pieces = [[held.piece(stack, e, i) for i in range(len(linears))] for e in range(experts)]
    assert torch.equal(held.joined(pieces), stack)
    assert {tuple(piece.shape) for one in pieces for piece in one} == {(4, *rows[1:])}


def test_roles_of_a_mixture_follow_the_dataflow() -> None:
    program = captured("qwen3_moe")
    assert routers(program) == {"model.layers.0.mlp.gate", "model.layers.2.mlp.gate"}
    first = mixtures(program)[0]
    assert len(first) == 4
    assert {name.rpartition(".")[2] for name in first[1]} == {"down_proj", "gate_proj", "up_proj"}
    alike = peers(mixtures(program))["model.layers.0.mlp.experts.2.up_proj"]
    assert alike == tuple(f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(4))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_smoothed_rotated_and_quantized_under_the_names_of_the_input(
    family: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home(family), tmp_path / "out"
    result = compiled(place, out, PASSES, scheme="auto")
    given, written = (
        {name: entry for file in path.glob("*.safetensors") for name, entry in read_header(file).items()}
        for path in (place.path, out)
    )
    added = {name for name in written if name.endswith(("weight_scale", "weight_offset"))}
    assert written.keys() - added == given.keys()
    kinds = json.loads((out / "quant_model_description.json").read_text())
    experts = [name for name in given if ".experts." in name]
    assert len(experts) > 12
    assert {kinds[name] for name in experts} == {"W8A8_DYNAMIC"}
    assert {kinds[name] for name in given if name.endswith((".gate.weight", "norm.weight"))} == {"FLOAT"}
    proved = [e["where"] for e in result.journal.entries if "certificate" in e]
    assert sum(".experts." in where for where in proved) == len(experts) // 3
    assert result.journal.worst < 1e-12
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, out))
    assert 1e-4 < relative(got, want) < 0.15


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts_in_four_bits_go_to_packed_files_and_back(
    family: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home("mixtral" if family == "gpt_oss" else family), tmp_path / "out"
    if family == "gpt_oss":  # stacks on disk, with biases
        gpt_oss(tmp_path / "in")
        place = Home(tmp_path / "in", capture(tmp_path / "in", certify=False), place.text)
    compiled(place, out, PASSES, scheme="experts-w4a8")
    kinds = json.loads((out / "quant_model_description.json").read_text())
    assert kinds["model_quant_type"] == "W8A8_DYNAMIC"
    stored = tensors_of(out)
    packed = {
        name.removesuffix(".weight")
        for name in stored
        if kinds[name] == "W4A8_DYNAMIC" and name.endswith(".weight")
    }
    assert packed
    assert all(".experts." in name for name in packed)
    last = {name for name in packed if stored[f"{name}.scale_bias"].shape[1] == 16}
    assert len(last) == len(packed) // 3
    assert {name.rpartition(".")[2] for name in last} <= {"down_proj", "w2"}
    assert not [check for check in verify(out) if check.wrong]
    (file,) = out.glob("*.safetensors")
    stored[f"{min(last)}.scale_bias"][0, 0] += 1.0
    save_file(stored, file)
    told = [line for check in verify(out) for line in check.wrong]
    assert any(f"{min(last)}.scale_bias: it is not eight times" in line for line in told)
    stored[f"{min(last)}.scale_bias"][0, 0] -= 1.0
    save_file(stored, file)
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, out))
    assert 1e-3 < relative(got, want) < 0.3


def test_a_stack_on_disk_is_cut_and_put_together_again(tmp_path: Path) -> None:
    gpt_oss(tmp_path)
    program = capture(tmp_path, certify=False)
    source = checkpoint(tmp_path, program.root)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    stack = tensors_of(tmp_path)["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(source.load([name])[name], stack[3, :, 1::2].T)
    assert source.shape(name) == (96, 64)
    assert source.disk_name(name) == name
    back: dict[str, Tensor] = {}
    for own, tensor in source.load(source.names()).items():
        back |= source.to_disk({own: tensor})
    stored = tensors_of(tmp_path)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[own], stored[own]) for own in stored)


def test_a_stack_on_disk_is_quantized_whole_or_not_at_all(tmp_path: Path) -> None:
    gpt_oss(tmp_path)
    program = capture(tmp_path, certify=False)
    whole = make_plan(program, "linear_quant", scheme="w8a8", target="modelslim")
    assert whole.problems == ()
    name = "model.layers.0.mlp.experts.1.up_proj"
    assert {f"{name}.weight", f"{name}.weight_scale"} <= whole.layout.specs.keys()
    assert not any(disk.endswith("gate_up_proj") for disk in whole.layout.specs)
    some = make_plan(program, f"linear_quant{{exclude={name}}}", scheme="w8a8", target="modelslim")
    assert len(some.problems) == 1
    assert f"{name}: it stays float beside others" in some.problems[0]
    none = make_plan(program, "linear_quant{exclude=*.experts.*}", scheme="w8a8", target="modelslim")
    assert none.problems == ()
    assert "model.layers.0.mlp.experts.gate_up_proj" in none.layout.specs


def test_an_expert_without_tokens_takes_what_the_others_saw() -> None:
    places = dict.fromkeys("abc", ("a", "b", "c"))
    observers = Observers([Statistic("absmax", name) for name in "abc"], places)
    weight = torch.eye(2)
    observers("a", torch.tensor([[1.0, -5.0]]), weight, None)
    observers("b", torch.tensor([[-3.0, 2.0]]), weight, None)
    observers("c", torch.empty(0, 2), weight, None)
    found = observers.results()
    assert found[Statistic("absmax", "c")].tolist() == [3.0, 5.0]
    assert found[Statistic("absmax", "a")].tolist() == [1.0, 5.0]
    assert observers.unseen == ["c"]


def test_experts_without_tokens_are_reported(home: Callable[[str], Home], tmp_path: Path) -> None:
    place = home("qwen3_moe")
    few = compiled(place, tmp_path / "few", PASSES, scheme="w8a8", samples=1, length=2)
    assert few.journal.idle_experts
    assert all(".experts." in name for name in few.journal.idle_experts)
    every = compiled(
        place, tmp_path / "every", PASSES, scheme="w8a8", samples=1, length=2, calibrate_all_experts=True
    )
    assert not every.journal.idle_experts


def test_proofs_run_every_expert() -> None:
    program = captured("mixtral")
    index = torch.zeros(6, 2, dtype=torch.int64)
    assert set(in_turn("any", index, 4).flatten().tolist()) == set(range(4))
    ran: list[tuple[str, int]] = []

    def hook(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ran.append((name, len(x)))
        return F.linear(x, weight.to(x.dtype))

    part = program.blocks[0]
    ids = torch.randint(0, 96, (1, 8), generator=torch.Generator().manual_seed(0))
    tensors = program.source.load(program.source.names())
    env = {n: {"input_ids": ids, "attention_mask": torch.ones_like(ids)}[str(n.target)]
           for n in program.graph.nodes if n.op == "placeholder"}  # fmt: skip
    env |= execute(program, program.parts[0], tensors, env, dtype=torch.float64)
    execute(program, part, tensors, env, dtype=torch.float64, linear=hook, route=in_turn)
    rows = {name: count for name, count in ran if name.endswith("down_proj")}
    assert len(rows) == 4
    assert set(rows.values()) == {4}


def test_a_target_that_serves_experts_in_eight_bits_says_so() -> None:
    found = planned("mixtral", "linear_quant", scheme="w4a4", target="vllm-ascend")
    assert any(
        "experts are served as W4A8_DYNAMIC, W8A8_DYNAMIC, not" in problem for problem in found.problems
    )
    assert not planned("mixtral", "linear_quant", scheme="w4a4", target="modelslim").problems
