"""A walk hands on what linears read as a whole run would have it, whatever became of the linears before them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qc.compiler.execute import execute, inputs_of, parameters_of
from qc.compiler.roles import read_together
from qc.compiler.walk import Walk
from tests.programs import captured


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_input_is_that_of_a_run_from_the_start_and_nothing_is_run_twice(family: str) -> None:
    program = captured(family)
    part = program.blocks[1]
    env, ids = {}, torch.arange(10)[None] + 1
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    env = {n: given[str(n.target)] for n in program.graph.nodes if n.op == "placeholder"}
    for before in program.parts[: part.index]:
        tensors = program.source.load(parameters_of(program, before))
        env |= execute(program, before, tensors, env, dtype=torch.float32)
    tensors = program.source.load(parameters_of(program, part))
    factor: dict[str, float] = {}
    ran: list[str] = []

    def hook(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ran.append(name)
        return F.linear(x, weight.float(), None if bias is None else bias.float()) * factor.get(name, 1.0)

    walk = Walk(
        program.nodes(part),
        lambda index: {node: env[node] for node in inputs_of(program, part)},
        lambda nodes, live, hook, index: execute(
            program, nodes, tensors, live, dtype=torch.float32, linear=hook
        ),
    )
    seen: dict[str, Tensor] = {}

    def whole(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen[name] = x
        return F.linear(x, weight.float(), None if bias is None else bias.float()) * factor.get(name, 1.0)

    together = read_together(program)
    groups = list(dict.fromkeys(together[name] for name in walk.linears if name in together))
    for group in groups:
        got = walk.input(group[0], 0, hook)
        execute(program, part, tensors, env, dtype=torch.float32, linear=whole)
        torch.testing.assert_close(got, seen[group[0]], rtol=0, atol=0)
        factor |= dict.fromkeys(group, 1.5)  # what a quantizer makes of them
    walk.finish(0, hook)
    assert len(ran) == len(set(ran))
    assert not walk.places
    want = execute(program, part, tensors, env, dtype=torch.float32, linear=whole)
    assert walk.results[0].keys() == {node.name for node in want}
    for node, value in want.items():
        torch.testing.assert_close(walk.results[0][node.name], value, rtol=0, atol=0)
    torch.testing.assert_close(walk.input(groups[1][0], 0, hook), seen[groups[1][0]], rtol=0, atol=0)
