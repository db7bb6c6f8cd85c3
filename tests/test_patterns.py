"""Patterns find shapes of dataflow: in every family, under any names, and nowhere else."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.mutant_rewrites import Mutant, killed_by, program_of
from qc.compiler.capture import capture
from qc.compiler.cli import main
from qc.compiler.contract import Setting
from qc.compiler.edit import Edit, Verb, apply, by_module
from qc.compiler.graph_edit import rewritten
from qc.compiler.operand import Hadamard, Slot, Vector
from qc.compiler.pattern import Pattern, Site
from qc.compiler.program import Program
from qc.compiler.roles import roles_of
from qc.passes.fuse_norms import FuseNorms
from qc.patterns.linear_linear import linear_linear
from qc.patterns.norm_linear import norm_linear
from qc.patterns.ov import ov, ov_heads
from qc.patterns.relu_linear import relu_linear
from qc.patterns.residual import residual, residual_centred
from qc.patterns.up_down import up_down
from tests.families import batch
from tests.programs import Drawing, captured, llama, run_float64

pytestmark = pytest.mark.broad

LAYERS = 3
PATTERNS: dict[str, Pattern[Any]] = {
    p.name: p for p in (norm_linear, ov, ov_heads, up_down, linear_linear, residual)
}
COUNTS: dict[str, tuple[int, int, int]] = {
    "llama": (2 * LAYERS + 1, LAYERS, LAYERS),
    "qwen2": (2 * LAYERS + 1, LAYERS, LAYERS),
    "qwen3": (2 * LAYERS + 1, LAYERS, LAYERS),
    "mistral": (2 * LAYERS + 1, LAYERS, LAYERS),
    "phi3": (2 * LAYERS + 1, LAYERS, LAYERS),
    "gemma": (2 * LAYERS + 1, LAYERS, LAYERS),
    "olmo": (0, LAYERS, LAYERS),  # norms without a gain
    "cohere": (LAYERS + 1, LAYERS, LAYERS),  # attention and MLP side by side
    "stablelm": (2 * LAYERS + 1, LAYERS, LAYERS),
    "gpt_neox": (2 * LAYERS + 1, LAYERS, 0),  # no gated product
    "opt": (2 * LAYERS + 1, LAYERS, 0),
    "gpt2": (2 * LAYERS + 1, LAYERS, 0),
}
"""Matches of norm_linear, ov and up_down in three layers."""
ROTATABLE = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma")
SETTING = Setting(scheme=None, roles={})


@pytest.mark.parametrize("family", COUNTS)
def test_sites_of_a_family(family: str) -> None:
    program = captured(family)
    found = {name: len(p.find(program)) for name, p in PATTERNS.items() if name != "residual"}
    norms, values, products = COUNTS[family]
    assert found == {
        "norm_linear": norms, "ov": values, "ov_heads": values, "up_down": products, "linear_linear": 0
    }  # fmt: skip


@pytest.mark.parametrize("family", COUNTS)
def test_the_residual_stream_is_found_once_norms_are_fused(family: str) -> None:
    program = captured(family)
    fused = rewritten(program, FuseNorms().rewrite(program, SETTING).rewrites)
    matches = residual.find(fused)
    centred = residual_centred.find(fused)
    if family not in ROTATABLE:
        assert not matches
        miss = residual.nearest(fused)
        assert miss is not None
        assert "subtracts the mean" in miss.reason
        assert len(centred) == 1
        return
    (match,) = matches
    linears = [n for n in program.graph.nodes if (leaf := program.leaf(n)) and leaf.kind == "linear"]
    ends = {str(n.target) for n in match.space.writers}
    assert len(ends) == 2 * LAYERS + 1
    assert {str(n.target) for n in match.space.readers} | ends >= {str(n.target) for n in linears}
    assert all(program.leaves[str(n.target)].kind == "norm" for n in match.space.norms)
    assert not residual.find(program), "norms with a gain were rotated through"


def test_values_of_packed_projections_are_their_own_channels() -> None:
    """Phi3 packs q, k, v; GPT-2 too, transposed; GPT-NeoX packs them head by head."""
    (phi3, *_) = ov.find(captured("phi3"))
    assert (phi3.heads, phi3.kv_heads, phi3.head_dim) == (4, 2, 16)
    assert phi3.v.channels == tuple(range(64 + 32, 64 + 32 + 32))
    (gpt2, *_) = ov.find(captured("gpt2"))
    assert gpt2.v.channels == tuple(range(128, 192))
    (neox, *_) = ov.find(captured("gpt_neox"))
    assert neox.v.channels == tuple(head * 48 + 32 + c for head in range(4) for c in range(16))
    gated = up_down.find(captured("phi3"))
    assert [match.up.channels for match in gated] == [tuple(range(96, 192))] * LAYERS
    assert all(match.gate_writers == (Site(match.up.module),) for match in gated)


def test_grouped_query_attention_knows_its_heads() -> None:
    for family in ("llama", "qwen2", "qwen3", "mistral"):
        for match in ov.find(captured(family)):
            assert (match.heads, match.kv_heads) == (4, 2)
            assert match.v.channels is None
            assert match.o.channels is None


def scales(match: Any) -> tuple[list[Edit], Slot]:
    """Edits that take a scale from what writes a match to what reads it."""
    if hasattr(match, "norm"):
        writer, readers, heads = match.norm, match.readers, None
    elif hasattr(match, "v"):
        writer, readers = match.v, (match.o,)
        heads = (match.kv_heads, match.head_dim)
    else:
        writer, readers, heads = match.up, (match.down,), None
    size = heads[0] * heads[1] if heads else 64 if hasattr(match, "norm") else 96
    slot = Slot(writer.module, (size,))
    spread = {"groups": heads, "repeat": match.heads // match.kv_heads} if heads else {}
    out = Edit(Verb.SCALE_OUT, writer, Vector(slot, inverse=True))
    return [out, *(Edit(Verb.SCALE_IN, reader, Vector(slot, **spread)) for reader in readers)], slot


def after(
    program: Program, tensors: Mapping[str, Tensor], edits: list[Edit], values: Any
) -> dict[str, Tensor]:
    result = dict(tensors)
    for module, own in by_module(edits).items():
        new = apply(program, module, own, values, result.get, torch.float64)
        result |= {f"{module}.{name}": tensor for name, tensor in new.items()}
    return result


def weights(program: Program) -> dict[str, Tensor]:
    held = program.source.load(program.source.names())
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in held.items()}
    return tensors | {name: tensors[owner] for name, owner in program.ties.items()}


@pytest.mark.parametrize("name", ["norm_linear", "ov", "up_down"])
@pytest.mark.parametrize("family", COUNTS)
def test_a_scale_at_every_site_of_a_family_keeps_its_logits(family: str, name: str) -> None:
    program = captured(family)
    ids, _ = batch(padded=False)
    tensors, changed = weights(program), weights(program)
    generator = torch.Generator().manual_seed(0)
    matches = PATTERNS[name].find(program)
    for match in matches:
        edits, slot = scales(match)
        values = {slot: torch.rand(slot.shape, generator=generator, dtype=torch.float64) + 0.5}
        changed = after(program, changed, edits, values)
    want, got = run_float64(program, tensors, ids), run_float64(program, changed, ids)
    assert torch.linalg.vector_norm(got - want) < 1e-10 * torch.linalg.vector_norm(want)
    if matches:
        first = scales(matches[0])
        broken = after(program, tensors, first[0][:1], {first[1]: torch.full(first[1].shape, 2.0)})
        moved = run_float64(program, broken, ids) - want
        assert torch.linalg.vector_norm(moved) > 1e-6 * torch.linalg.vector_norm(want)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_a_matrix_per_head_keeps_the_logits(family: str) -> None:
    program = captured(family)
    ids, _ = batch(padded=False)
    tensors = weights(program)
    changed = tensors
    for match in ov_heads.find(program):
        edits = [
            Edit(Verb.ROTATE_OUT, match.v, Hadamard(match.head_dim, 1, match.kv_heads)),
            Edit(Verb.ROTATE_IN, match.o, Hadamard(match.head_dim, 1, match.heads)),
        ]
        changed = after(program, changed, edits, {})
    want, got = run_float64(program, tensors, ids), run_float64(program, changed, ids)
    assert torch.linalg.vector_norm(got - want) < 1e-10 * torch.linalg.vector_norm(want)


# Names mean nothing.


def renamed(program: Program, names: Mapping[str, str]) -> Program:
    """The same program with its modules under other names, and nothing left of where they were."""
    fork = program.fork()
    for node in fork.graph.nodes:
        module, dot, local = str(node.target).rpartition(".")
        if node.op == "call_module":
            node.target = names[str(node.target)]
        elif node.op == "get_attr":
            node.target = names.get(module, "other") + dot + local
        node.meta = {key: value for key, value in node.meta.items() if key in ("val", "part")}
        node._rename(f"n{len(node.name)}")
    leaves = {names[name]: leaf for name, leaf in fork.leaves.items()}
    return replace(fork, leaves=leaves, root=nn.Module(), config=None, path=None)


def shown(program: Program, names: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """All matches of all patterns as text, values by their place in the graph, modules under ``names``."""
    order = {node.name: f"node {i}" for i, node in enumerate(program.graph.nodes)}

    def plain(thing: Any) -> str:
        if isinstance(thing, Site):
            name = thing.module if names is None else names[thing.module]
            return f"{name}{thing.channels}"
        if isinstance(thing, tuple):
            return str([plain(item) for item in thing])
        return order.get(thing, str(thing))

    return {
        name: [str({key: plain(value) for key, value in vars(match).items()}) for match in p.find(program)]
        for name, p in PATTERNS.items()
        if name != "residual"
    }


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("how", ["words", "shuffled"])
def test_renaming_every_module_changes_nothing(family: str, how: str) -> None:
    program = captured(family)
    names = sorted(program.leaves)
    others = [f"w{i}" for i in range(len(names))] if how == "words" else list(names)
    random.Random(0).shuffle(others)
    new = dict(zip(names, others, strict=True))
    other = renamed(program, new)
    assert shown(other) == shown(program, new)
    roles = {role: {new[name] for name in found} for role, found in roles_of(program).items()}
    assert roles_of(other) == roles


class Scrambled(nn.Module):
    """A decoder whose attributes have whatever names it is given."""

    def __init__(self, names: list[str], layers: int = 2) -> None:
        super().__init__()
        self.names = names
        width = 16
        if layers:
            self.add_module(names[0], nn.Embedding(11, width))
            self.add_module(names[1], nn.ModuleList(Scrambled(names, 0) for _ in range(layers)))
            self.add_module(names[2], nn.Linear(width, 11))
            return
        for name in (names[3], names[4]):
            self.add_module(name, nn.RMSNorm(width, eps=1e-6))
        sizes = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16)]
        for name, (inside, out) in zip(names[5:], sizes, strict=True):
            self.add_module(name, nn.Linear(inside, out))

    def forward(self, input_ids: Tensor) -> Tensor:
        if hasattr(self, self.names[1]):
            x = getattr(self, self.names[0])(input_ids)
            for layer in getattr(self, self.names[1]):
                x = layer(x)
            return getattr(self, self.names[2])(x)
        x = input_ids
        n1, n2, q, k, v, o, gate, up, down = (getattr(self, name) for name in self.names[3:])
        b, s, _ = x.shape
        n = n1(x)
        q, k, v = q(n).view(b, s, 4, 4), k(n).view(b, s, 2, 4), v(n).view(b, s, 2, 4)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        a = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + o(a.transpose(1, 2).reshape(b, s, 16))
        n = n2(x)
        return x + down(up(n) * nn.functional.silu(gate(n)))


def test_a_module_with_any_attribute_names_has_the_same_matches() -> None:
    names = [f"z{i}" for i in random.Random(1).sample(range(100), 12)]
    example = {"input_ids": torch.zeros(2, 5, dtype=torch.int64)}
    program = capture(Scrambled(names), example=example, certify=False)
    found = {name: len(p.find(program)) for name, p in PATTERNS.items()}
    assert found == {
        "norm_linear": 4, "ov": 2, "ov_heads": 2, "up_down": 2, "linear_linear": 0, "residual": 0
    }  # fmt: skip
    (first, _) = ov.find(program)
    layer = f"{names[1]}.0"
    assert (first.v.module, first.o.module) == (f"{layer}.{names[7]}", f"{layer}.{names[8]}")
    assert (first.heads, first.kv_heads, first.head_dim) == (4, 2, 4)
    (product, _) = up_down.find(program)
    assert product.gate_writers == (Site(f"{layer}.{names[9]}"),)


def test_a_whole_drawn_layer_matches_like_a_captured_one() -> None:
    d = Drawing()
    x = llama(d, "model.layers.0", d.embedding("model.embed_tokens", 11, 16))
    program = d.program(d.linear("lm_head", d.norm("model.norm", x), 11))
    found = {name: len(p.find(program)) for name, p in PATTERNS.items()}
    assert found == {
        "norm_linear": 3, "ov": 1, "ov_heads": 1, "up_down": 1, "linear_linear": 0, "residual": 0
    }  # fmt: skip


def test_why_prints_the_nearest_miss_and_the_matches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qc.compiler.capture.capture", lambda model, **options: captured(model))
    assert main(["why", "opt", "up_down", "--at", "model.decoder.layers.1"]) == 0
    out = capsys.readouterr().out
    assert "nearest miss at model.decoder.layers.1" in out
    assert "no product of two values reads it" in out
    assert main(["why", "llama", "ov", "--at", "model.layers.2.self_attn"]) == 0
    out = capsys.readouterr().out
    assert "matches: v=model.layers.2.self_attn.v_proj, o=model.layers.2.self_attn.o_proj, heads=" in out
    assert "model.layers.1." not in out
    assert main(["why", "llama", "residual"]) == 0
    assert "fuse it into its readers first (fuse_norms)" in capsys.readouterr().out
    assert main(["why", "llama", "up_donw"]) == 2
    assert "did you mean up_down?" in capsys.readouterr().err


# ReLU and its powers.


@pytest.mark.parametrize(("family", "degree"), [("opt", 1), ("nemotron", 2), ("arcee", 2)])
def test_a_scale_comes_out_of_a_relu_to_its_power(family: str, degree: int) -> None:
    program = program_of(family)
    found = relu_linear.find(program)
    assert len(found) == len(program.blocks)
    assert {match.degree for match in found} == {degree}
    passes = "iter_smooth{enable_subgraph_type=relu-linear}"
    assert not killed_by(None, family, passes)
    if degree == 2:
        wrong = Mutant("power lost", (family,), passes, {Verb.SCALE_OUT: without_power})
        assert "claims to keep the function" in killed_by(wrong, family)


def without_power(right: Any, leaf: Any, tensors: Any, edit: Edit, *rest: Any) -> None:
    assert isinstance(edit.operand, Vector)
    right(leaf, tensors, replace(edit, operand=replace(edit.operand, power=1.0)), *rest)


def test_gates_and_other_activations_are_no_relu() -> None:
    assert relu_linear.find(captured("llama")) == ()
    assert relu_linear.find(captured("gpt2")) == ()
