"""Execution: part by part in any dtype, with hooks, observers, gradients and edits, and nothing kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional as F

from qc.compiler.attention import attend, attention, explicit_attention
from qc.compiler.errors import Failed
from qc.compiler.execute import execute, inputs, inputs_of, outputs_of, parameters_of, run
from qc.compiler.program import Program
from tests.families import ALL, batch
from tests.programs import captured


def state(program: Program, index: int) -> dict[str, Tensor]:
    return program.source.load(parameters_of(program, program.parts[index]))


def before_first_block(program: Program, dtype: torch.dtype) -> dict[fx.Node, Any]:
    ids, mask = batch()
    env: dict[fx.Node, Any] = dict(inputs(program, ids, mask))
    return env | execute(program, program.parts[0], state(program, 0), env, dtype=dtype)


def test_gradients_change_no_value() -> None:
    program, (ids, mask) = captured("llama"), batch()
    name = next(name for name in program.source.names() if name.endswith("q_proj.weight"))
    weight = program.source.load([name])[name].float().requires_grad_()
    got = run(program, ids, mask, dtype=torch.float32, tensors={name: weight})
    (grad,) = torch.autograd.grad(got.square().mean(), weight)
    assert float(grad.abs().sum()) > 0
    with torch.no_grad():
        assert torch.equal(run(program, ids, mask, dtype=torch.float32), got)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "stablelm"])
def test_float64_has_no_float32_inside(family: str) -> None:
    program = captured(family)
    ids, mask = batch()
    seen: list[torch.dtype] = []

    def watch(node: fx.Node, given: tuple[Any, ...], value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            seen.append(value.dtype)

    with torch.no_grad():
        wide = run(program, ids, mask, dtype=torch.float64, on_value=watch)
        plain = run(program, ids, mask, dtype=torch.float32)
    assert set(seen) == {torch.float64}
    rows = mask.bool()
    error = (wide - plain)[rows].norm() / wide[rows].norm()
    assert 1e-9 < error < 1e-4


def test_a_block_returns_what_others_read_and_nothing_else() -> None:
    program = captured("llama")
    block = program.blocks[0]
    env = before_first_block(program, torch.bfloat16)
    found = execute(program, block, state(program, 1), env, dtype=torch.bfloat16)
    assert tuple(found) == outputs_of(program, block)
    (hidden,) = found.values()
    assert hidden.shape == (3, 11, 64)
    assert [n.name for n in inputs_of(program, block)] == [
        n.name for n in dict.fromkeys(inputs_of(program, block))
    ]
    assert set(inputs_of(program, block)) <= set(env)


def test_a_linear_hook_runs_in_place_of_every_linear() -> None:
    program = captured("gpt2")
    block = program.blocks[0]
    env = before_first_block(program, torch.float32)
    tensors = state(program, 1)
    called: list[str] = []

    def same(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        called.append(name)
        assert weight.shape[1] == x.shape[-1]
        return F.linear(x, weight.float(), None if bias is None else bias.float())

    (plain,) = execute(program, block, tensors, env, dtype=torch.float32).values()
    (hooked,) = execute(program, block, tensors, env, dtype=torch.float32, linear=same).values()
    assert torch.allclose(plain, hooked, atol=1e-5)
    wanted = [n.target for n in program.nodes(block) if (leaf := program.leaf(n)) and leaf.kind == "linear"]
    assert called == wanted
    (zero,) = execute(
        program,
        block,
        tensors,
        env,
        dtype=torch.float32,
        linear=lambda n, x, w, b: F.linear(x, w.float() * 0),
    ).values()
    assert torch.equal(zero, env[inputs_of(program, block)[0]])


def test_the_hook_gets_the_tensors_as_they_were_handed_in() -> None:
    program = captured("llama")
    tensors = {n: t.double() for n, t in state(program, 1).items()}
    env = before_first_block(program, torch.bfloat16)
    dtypes: set[torch.dtype] = set()

    def watch(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtypes.update({x.dtype, weight.dtype})
        return F.linear(x, weight.to(x.dtype))

    execute(program, program.blocks[0], tensors, env, dtype=torch.bfloat16, linear=watch)
    assert dtypes == {torch.bfloat16, torch.float64}


def test_an_observer_sees_every_value_with_its_operands() -> None:
    program = captured("llama")
    block = program.blocks[0]
    env = before_first_block(program, torch.bfloat16)
    seen: dict[fx.Node, int] = {}

    def watch(node: fx.Node, given: tuple[Any, ...], value: Any) -> None:
        assert len(given) == len(node.all_input_nodes)
        seen[node] = seen.get(node, 0) + 1

    execute(program, block, state(program, 1), env, dtype=torch.bfloat16, on_value=watch)
    assert seen == dict.fromkeys(program.nodes(block), 1)


def test_values_are_freed_after_their_last_use() -> None:
    import weakref

    program = captured("llama")
    block = program.blocks[0]
    env = before_first_block(program, torch.bfloat16)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(node: fx.Node, given: tuple[Any, ...], value: Any) -> None:
        nonlocal most
        if isinstance(value, Tensor):
            alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))

    execute(program, block, state(program, 1), env, dtype=torch.bfloat16, on_value=watch)
    assert most < len(alive) // 2


def test_gradients_flow_through_a_block() -> None:
    program = captured("qwen3")
    block = program.blocks[0]
    env = before_first_block(program, torch.float32)
    tensors = {n: t.float().requires_grad_() for n, t in state(program, 1).items()}
    (out,) = execute(program, block, tensors, env, dtype=torch.float32).values()
    out.square().mean().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in tensors.values())


def test_an_inserted_node_runs() -> None:
    program = captured("llama").fork()
    block = program.blocks[0]
    down = next(n for n in program.nodes(block) if str(n.target).endswith("down_proj"))
    (source,) = down.args
    assert isinstance(source, fx.Node)
    with program.graph.inserting_before(down):
        node = program.graph.call_function(torch.ops.aten.mul.Tensor, (source, 0.0))
    node.meta = {"part": block.index, "val": source.meta["val"]}
    down.replace_input_with(source, node)
    env = before_first_block(program, torch.bfloat16)
    seen: list[Tensor] = []
    execute(
        program,
        block,
        state(program, 1),
        env,
        dtype=torch.bfloat16,
        on_value=lambda n, given, value: seen.append(value) if n is down else None,
    )
    assert not seen[0].any()


def test_what_is_missing_is_named() -> None:
    program = captured("smollm2")
    env = before_first_block(program, torch.bfloat16)
    tensors = state(program, 1)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(Failed, match=r"no tensor was given for model\.layers\.0\.mlp\.up_proj\.weight"):
        execute(program, program.blocks[0], tensors, env, dtype=torch.bfloat16)
    with pytest.raises(Failed, match="needs the value of"):
        execute(program, program.blocks[1], state(program, 2), env, dtype=torch.bfloat16)
    hidden = {outputs_of(program, program.blocks[-1])[0]: torch.zeros(1, 2, 48)}
    with pytest.raises(Failed, match=r"lm_head\.weight \(stored as model\.embed_tokens\.weight\)"):
        execute(
            program, program.parts[-1], {"model.norm.weight": torch.ones(48)}, hidden, dtype=torch.float32
        )


def test_tensors_stand_in_for_the_source() -> None:
    program = captured("llama")
    ids, mask = batch()
    head = program.source.load(["lm_head.weight"])["lm_head.weight"]
    with torch.no_grad():
        once = run(program, ids, mask, dtype=torch.float32)
        twice = run(program, ids, mask, dtype=torch.float32, tensors={"lm_head.weight": 2 * head})
    assert torch.equal(twice, 2 * once)


heads = st.sampled_from([(4, 4), (4, 2), (6, 3), (8, 1)])


@given(
    heads=heads,
    length=st.integers(1, 9),
    masked=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_is_its_formula(
    heads: tuple[int, int], length: int, masked: bool, softcap: float | None, sinks: bool, seed: int
) -> None:
    h, kv = heads
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(2, h, length, 8), draw(2, kv, length, 8), draw(2, kv, length, 8)
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None] if masked else None
    logits = draw(h) if sinks else None
    got = attention(q, k, v, mask, 0.3, softcap, logits)
    want = torch.zeros(2, length, h, 8, dtype=torch.float64)
    for i in range(h):
        j = i // (h // kv)
        scores = q[:, i] @ k[:, j].transpose(1, 2) * 0.3
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], -1e300)
        weights = scores.exp()
        total = weights.sum(-1, keepdim=True) + (0 if logits is None else logits[i].exp())
        want[:, :, i] = weights / total @ v[:, j]
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)
    assert got.is_contiguous()


@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (7.0, False), (None, True)])
def test_attention_has_the_gradients_of_its_formula(softcap: float | None, sinks: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 3, 2), (1, 2, 3, 2), (1, 2, 3, 2)] + ([(4,)] if sinks else [])
    operands = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    mask = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]

    def run_op(q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None = None) -> Tensor:
        return attention(q, k, v, mask, 0.5, softcap, extra)

    assert torch.autograd.gradcheck(run_op, tuple(operands))


def test_the_op_passes_the_checks_of_custom_ops() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 3, 4, generator=generator).requires_grad_() for h in (4, 2, 2))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    torch.library.opcheck(attention, (q, k, v, mask, 0.5))


def test_fused_attention_is_the_one_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 8, generator=generator) for h in (6, 3, 3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    plain = explicit_attention(q, k, v, mask, 0.3, None, None).transpose(1, 2)
    assert torch.allclose(attend(q, k, v, mask, 0.3), plain, atol=1e-6)
    added = torch.where(mask, 0.0, -1e30)
    assert torch.allclose(attend(q, k, v, added, 0.3), plain, atol=1e-6)


def test_every_family_of_the_tests_has_a_name() -> None:
    assert len(ALL) == len({str(make().to_dict()) for make in ALL.values()})
