"""Proofs: right rewrites pass at rounding error; what is done wrong on purpose is in ``test_mutants``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.mutant_rewrites import forgets
from qc.compiler import edit as edits_of
from qc.compiler.certificate import LIMIT, check, error, outcome
from qc.compiler.contract import Rewrite
from qc.compiler.edit import Verb
from qc.compiler.errors import NotEquivalent
from qc.compiler.journal import Journal
from qc.compiler.plan import Plan, make_plan
from qc.compiler.program import Program
from qc.compiler.solve import Solver
from qc.compiler.twin_proof import prove_on_twin
from qc.compiler.view import BlockView
from qc.passes.iter_smooth import IterSmooth
from tests.families import ALL, batch, build
from tests.programs import captured, norm_graph

SMOOTH = "iter_smooth{enable_subgraph_type=norm-linear+ov+up-down}"
SHIFT = "iter_smooth{symmetric=false, enable_subgraph_type=norm-linear}"
QUAROT = "quarot{online=true}"
ON_VALUES = "online_rotation{enable_subgraph_type=ov}"


def planned(family: str, passes: str, scheme: str = "float") -> Plan:
    """A plan for a tiny model in memory whose floats are kept in float32."""
    plan = make_plan(captured(family), passes, scheme=scheme, target="modelslim")
    assert all("behind an online rotation" in problem for problem in plan.problems)  # nothing here is written
    return replace(plan, dtype=torch.float32)


def solved(plan: Plan) -> tuple[Journal, dict[str, Tensor]]:
    """Solve a plan on random tokens; its journal, and the tensors it hands on."""
    ids, _ = batch(shape=(6, 20), padded=False)
    found: dict[str, Tensor] = {}
    journal = Solver(plan, ids, found.__setitem__, compute=torch.float32).run()
    return journal, found


RIGHT = [
    ("llama", SMOOTH),
    ("llama", f"{SMOOTH},{SHIFT}"),
    ("llama-128", f"iter_smooth,{QUAROT},iter_smooth"),
    ("smollm2", "iter_smooth{group_method=mean},quarot,iter_smooth{symmetric=false}"),
    ("qwen2", f"iter_smooth,quarot,{ON_VALUES},iter_smooth"),
    ("qwen3", "iter_smooth,quarot{block_size=8},iter_smooth"),
    ("phi3", "iter_smooth,quarot{block_size=16},iter_smooth"),
    ("gemma", f"{SMOOTH},{SHIFT}"),
    ("gemma", "quarot{block_size=16},iter_smooth"),
    ("stablelm", f"fuse_norms,{SMOOTH}"),
    ("gpt_neox", f"{SMOOTH},rotate_heads"),
    ("gpt2", f"{SMOOTH},rotate_heads,{ON_VALUES}"),
]


@pytest.mark.parametrize(("family", "passes"), RIGHT)
def test_right_rewrites_are_proved_at_rounding_error(family: str, passes: str) -> None:
    journal, _ = solved(planned(family, passes))
    assert journal.proofs >= 3
    assert 0 < journal.worst < 1e-12
    stored = [entry["stored"] for entry in journal.entries if "stored" in entry]
    assert stored
    assert all(value < 1e-4 for value in stored)


def test_an_edit_that_a_pass_forgets_is_caught() -> None:
    """Not the verb but the answer is wrong: one reader has no edit."""
    plan = planned("llama", "fuse_norms")
    (step,) = plan.steps
    rewrite = step.answer.rewrites[0]
    short = replace(rewrite, edits=rewrite.edits[1:])
    answer = replace(step.answer, rewrites=(short, *step.answer.rewrites[1:]))
    with pytest.raises(NotEquivalent, match=r"fuse_norms at .*input_layernorm \(model\.layers\.0\)"):
        solved(replace(plan, steps=(replace(step, answer=answer),)))


def test_a_wrong_rotation_is_caught_on_the_twin_before_a_weight_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twin = captured("smollm2")

    class Unread:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"a weight was asked for: {name}")

    program = replace(twin, source=Unread(), twin=twin)  # type: ignore[arg-type]
    plan = make_plan(
        replace(program, source=twin.source), "quarot,iter_smooth", scheme="float", target="modelslim"
    )
    plan = replace(plan, program=program)
    assert "keep the twin's logits" in prove_on_twin(plan)
    right = edits_of.VERBS[Verb.ROTATE_OUT]
    wrong = partial(forgets("embed_tokens"), right)
    monkeypatch.setitem(edits_of.VERBS, Verb.ROTATE_OUT, wrong)
    with pytest.raises(NotEquivalent, match="twin"):
        prove_on_twin(plan)


def test_an_error_is_judged_by_what_a_block_adds() -> None:
    x, delta = torch.full((2, 3, 4), 1e6, dtype=torch.float64), torch.ones(2, 3, 4, dtype=torch.float64)
    got = error({"y": x + delta}, {"y": x + 1.5 * delta}, {"x": x, "ids": torch.zeros(2, 3)})
    assert got == pytest.approx(0.5)
    assert error({"y": delta}, {"y": 2 * delta}, {}) == pytest.approx(1.0)
    assert error({"y": delta}, {"y": delta * float("nan")}, {}) == float("inf")


@pytest.mark.parametrize("math", [LIMIT, 0.3, float("nan"), float("inf")])
def test_what_is_not_below_the_limit_stops(math: float) -> None:
    check("somewhere", LIMIT / 2, "again")
    with pytest.raises(NotEquivalent, match="somewhere"):
        check("somewhere", math, "again")


def test_a_lost_epsilon_shows_in_float64() -> None:
    """Transformers' norms compute in float32, where this drowns; the proof runs the norm's own ops."""
    program = captured("llama")
    (part, *_) = program.blocks
    name = f"{part.name}.input_layernorm"
    leaf = program.leaves[name]
    assert leaf.norm is not None
    lost = replace(leaf, graph=norm_graph(replace(leaf.norm, eps=0.0)))
    other = replace(program, leaves={**program.leaves, name: lost})
    tensors = {n: t.double() for n, t in program.source.load(program.source.names()).items()}
    ids, mask = batch(padded=False)
    env: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    env |= outcome(program, program.parts[0], tensors, env, ())
    want, got = (outcome(p, part, tensors, env, ()) for p in (program, other))
    assert error(want, want, env) == 0
    assert error(want, got, env) > LIMIT


# Statistics are those of the model as it is when a pass measures it.


def measured(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The statistics that iter_smooth sees, the last for each linear."""
    found: dict[str, Tensor] = {}
    solve = IterSmooth.solve

    def recording(self: IterSmooth, rewrite: Rewrite, view: BlockView) -> Mapping[Any, Tensor]:
        for slot in rewrite.slots:
            for need in slot.needs:
                found[need.module] = view.statistic(need)
        return solve(self, rewrite, view)

    with monkeypatch.context() as patch:
        patch.setattr(IterSmooth, "solve", recording)
        solved(plan)
    return found


def of_reference(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Largest input magnitudes of every linear of the plain model with these weights, on the same tokens."""
    model = build(ALL[family]()).float()
    model.load_state_dict(dict(tensors), strict=True)
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, args: found.__setitem__(name, args[0].flatten(0, -2).abs().amax(0))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(batch(shape=(6, 20), padded=False)[0])
    return found


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


STAGES = {
    "first": ("", "iter_smooth{enable_subgraph_type=ov+up-down+norm-linear}"),
    "after smoothing": ("iter_smooth{enable_subgraph_type=ov+up-down}", "iter_smooth"),
    "after a rotation": ("iter_smooth,quarot", "iter_smooth"),
    "before a rotation": ("", "iter_smooth,quarot"),
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", list(STAGES))
def test_statistics_are_those_of_the_model_as_rewritten_so_far(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rest = STAGES[name]
    plan = planned(family, f"{before},{rest}" if before else rest)
    got = measured(plan, monkeypatch)
    tensors = solved(planned(family, before))[1] if before else dict(build(ALL[family]()).state_dict())
    want = of_reference(family, tensors)
    assert len(got) >= 6
    for module, statistic in got.items():
        assert relative(statistic, want[module]) < 1e-4, module
    if "after a rotation" in name:
        plain = of_reference(family, build(ALL[family]()).state_dict())
        readers = [module for module in got if module.endswith("q_proj")]
        assert all(relative(got[module], plain[module]) > 0.05 for module in readers)


def test_an_online_rotation_does_not_change_what_the_norms_readers_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_online = measured(planned("llama-128", f"iter_smooth,{QUAROT},iter_smooth"), monkeypatch)
    without = measured(planned("llama-128", "iter_smooth,quarot,iter_smooth"), monkeypatch)
    readers = [module for module in with_online if module.endswith(("q_proj", "gate_proj"))]
    assert len(readers) == 6
    assert all(relative(with_online[module], without[module]) < 1e-4 for module in readers)


def test_a_solved_model_computes_what_it_computed() -> None:
    """Through transformers' own modules: the tensors handed on are a model with the same logits."""
    ids, mask = batch()
    for family, passes in (("llama", "iter_smooth,quarot,iter_smooth"), ("qwen2", "iter_smooth,quarot")):
        model = build(ALL[family]()).float()
        with torch.no_grad():
            want = model(ids, attention_mask=mask).logits
            model.load_state_dict(solved(planned(family, passes))[1], strict=True)
            got = model(ids, attention_mask=mask).logits
        keep = mask.bool()
        assert relative(got[keep], want[keep]) < 1e-4


def test_a_program_is_not_changed_by_planning_or_solving() -> None:
    program = captured("llama-128")
    before = state(program)
    solved(planned("llama-128", f"iter_smooth,{QUAROT},iter_smooth,linear_quant", scheme="w4a4"))
    assert state(program) == before


def state(program: Program) -> list[tuple[str, ...]]:
    facts = ("scheme", "unit", "rotated", "shifted", "note")
    return [
        (n.name, f"{n.target} {n.args}", *(str(n.meta.get(fact)) for fact in facts))
        for n in program.graph.nodes
    ]
