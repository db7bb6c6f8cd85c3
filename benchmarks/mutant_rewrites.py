"""Rewrites done wrong on purpose: each has to be caught by the proof, on every family that it names.

Rotations are random orthogonal matrices here, not Hadamards: some Hadamards are symmetric, and a matrix that is its
own transpose lets a forgotten transpose pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, fx
from transformers import AutoModelForCausalLM

from qc.compiler import edit as edits_of
from qc.compiler.capture import capture
from qc.compiler.contract import EXACT, Answer, Pass, Rewrite, Setting
from qc.compiler.edit import Edit, Verb
from qc.compiler.errors import NotEquivalent
from qc.compiler.laws import is_attention, shape
from qc.compiler.operand import Hadamard, Kronecker, Slot, Vector, stored_factors
from qc.compiler.pattern import Site
from qc.compiler.plan import Plan, make_plan
from qc.compiler.program import Leaf, Program
from qc.compiler.solve import Solver
from qc.runtime.hadamard import random_orthogonal

from .reach_configs import small_config

TOKENS = (6, 20)
SMOOTH = "iter_smooth{enable_subgraph_type=norm-linear+ov+up-down}"
SHIFT = "iter_smooth{symmetric=false,enable_subgraph_type=norm-linear}"
ONLINE = "online_rotation{factor=random,enable_subgraph_type=ov}"
RMS = ("llama", "mistral", "qwen3", "gemma")
LAYER_NORM = ("stablelm", "gpt_neox", "opt", "gpt2")

Verbs = Callable[..., Any]
"""``change(right, leaf, tensors, edit, values, get, dtype)``: the weight side of a verb, given the right one."""


@dataclass(frozen=True)
class Mutant:
    """One way to do a rewrite wrong."""

    name: str
    families: tuple[str, ...]
    passes: Any
    """Passes of the plan, as text or as a list."""
    verbs: Mapping[Verb, Verbs] = field(default_factory=dict)
    plan: Callable[[Plan], Plan] | None = None
    """What is wrong in the plan itself."""
    also: Callable[[], Any] | None = None
    """A further patch."""


@cache
def program_of(family: str) -> Program:
    """A tiny random model of a family with grouped heads where it can have them, captured."""
    config = small_config(family)
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (2.0 / parameter.shape[-1]) ** 0.5)
    return capture(model, certify=False)


def killed_by(mutant: Mutant | None, family: str, passes: Any = None) -> str:
    """What the proof said of a mutant on a family, empty where it let it through; no mutant is the right rewrite.

    Raises:
        ValueError: The mutant found nothing to do wrong there.
    """
    chosen = passes or (mutant.passes if mutant else "")
    plan = make_plan(program_of(family), chosen, scheme="float", target="modelslim")
    others = tuple(p for p in plan.problems if "behind an online rotation" not in p)  # nothing is written
    plan = replace(plan, dtype=torch.float32, problems=others).require()
    done: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(patch.object(Hadamard, "times", lambda self, x: _turn(self, x, False)))
        stack.enter_context(patch.object(Hadamard, "times_transposed", lambda self, x: _turn(self, x, True)))
        if mutant is not None:
            for verb, change in mutant.verbs.items():
                stack.enter_context(patch.dict(edits_of.VERBS, {verb: _watched(verb, change, done)}))
            if mutant.plan is not None:
                plan = mutant.plan(plan)
                done.append("plan")
            if mutant.also is not None:
                stack.enter_context(mutant.also())
                done.append("patch")
        ids = torch.randint(3, 90, TOKENS, generator=torch.Generator().manual_seed(0))
        try:
            Solver(plan, ids, lambda name, tensor: None, compute=torch.float32).run()
        except NotEquivalent as error:
            return " ".join(str(error).split())
        finally:
            if mutant is not None and not done:
                raise ValueError(f"{mutant.name}: nothing to do wrong in {family}")
    return ""


def _watched(verb: Verb, change: Verbs, done: list[str]) -> Verbs:
    """The wrong verb; ``done`` grows where it makes other tensors than the right one."""
    right = edits_of.VERBS[verb]

    def spoiled(leaf: Leaf, tensors: dict[str, Tensor], *rest: Any) -> None:
        want, got = dict(tensors), dict(tensors)
        right(leaf, want, *rest)
        change(right, leaf, got, *rest)
        if want.keys() != got.keys() or any(not torch.equal(want[name], got[name]) for name in want):
            done.append(verb.name)
        tensors.clear()
        tensors.update(got)

    return spoiled


def _turn(rotation: Hadamard, x: Tensor, transposed: bool) -> Tensor:
    matrix = _matrix(rotation).to(x)
    y = x.reshape(*x.shape[:-1], rotation.copies, rotation.order)
    return (y @ (matrix.T if transposed else matrix)).reshape(x.shape)


@lru_cache(maxsize=64)
def _matrix(rotation: Hadamard) -> Tensor:
    """A random orthogonal matrix [order, order] of no symmetry; with ``keeps_ones`` one with Q 1 = 1."""
    n, seed = rotation.order, rotation.seed
    if not rotation.keeps_ones:
        return random_orthogonal(n, seed)
    start = torch.cat([torch.ones(n, 1, dtype=torch.float64), random_orthogonal(n, seed)[:, 1:]], dim=1)
    basis = torch.linalg.qr(start).Q
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), random_orthogonal(n - 1, seed + 1))
    return basis @ inner @ basis.T


def forgets(*ends: str) -> Verbs:
    """The verb is left out at modules whose names end like this."""

    def change(right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, *rest: Any) -> None:
        if not edit.site.module.endswith(ends):
            right(leaf, tensors, edit, *rest)

    return change


def other(operand: Callable[[Any], Any]) -> Verbs:
    """The verb gets another operand."""

    def change(right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, *rest: Any) -> None:
        right(leaf, tensors, replace(edit, operand=operand(edit.operand)), *rest)

    return change


def without_bias(right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, *rest: Any) -> None:
    """The bias of a linear stays as it was."""
    bias = tensors.pop("bias", None) if leaf.kind == "linear" else None
    right(leaf, tensors, edit, *rest)
    if bias is not None:
        tensors["bias"] = bias


def without_norm_bias(right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, *rest: Any) -> None:
    """The bias of a norm stays as it was."""
    if leaf.norm is None:
        right(leaf, tensors, edit, *rest)


def on_rows(right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, *rest: Any) -> None:
    """A square weight is changed on its other side."""
    weight = tensors.get("weight")
    if leaf.kind != "linear" or weight is None or weight.shape[0] != weight.shape[1]:
        right(leaf, tensors, edit, *rest)
        return
    turned = {**tensors, "weight": weight.T.contiguous()}
    right(leaf, turned, edit, *rest)
    tensors.update(turned, weight=turned["weight"].T)


def transposed(right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, *rest: Any) -> None:
    """Q where its transpose belongs."""
    with patch.object(Hadamard, "times", Hadamard.times_transposed):
        right(leaf, tensors, edit, *rest)


def shifted_channels(right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, *rest: Any) -> None:
    """Channels of a packed linear, off by one."""
    channels = edit.site.channels
    if channels is not None:
        moved = tuple((c + 1) % tensors["weight"].shape[0] for c in channels)
        edit = replace(edit, site=replace(edit.site, channels=moved))
    right(leaf, tensors, edit, *rest)


def without_offset(right: Verbs, leaf: Leaf, *rest: Any) -> None:
    """The gain is ``w`` where it is ``1 + w``."""
    right(replace(leaf, norm=replace(leaf.norm, offset=0.0)) if leaf.norm else leaf, *rest)


def negative(right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, values: Any, *rest: Any) -> None:
    """The shift has the wrong sign."""
    right(leaf, tensors, edit, {slot: -value for slot, value in values.items()}, *rest)


def inverse_for_inverse_transpose(
    right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, values: Any, get: Any, dtype: torch.dtype
) -> None:
    """W (L ⊗ R)⁻¹ where W (L ⊗ R)⁻ᵀ belongs."""
    assert isinstance(edit.operand, Kronecker)
    left, step = stored_factors(edit.operand)
    weight = tensors["weight"]
    kernel = torch.block_diag(*[torch.kron(left, step)] * edit.operand.copies)
    tensors["weight"] = (weight.double() @ kernel.inverse()).to(dtype)
    tensors["left_trans"], tensors["right_trans"] = left.to(dtype), step.to(dtype)


def transpose_for_inverse_transpose(
    right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, values: Any, get: Any, dtype: torch.dtype
) -> None:
    """W (L ⊗ R): right only if the rounded factors were orthogonal."""
    assert isinstance(edit.operand, Kronecker)
    left, step = stored_factors(edit.operand)
    kernel = torch.block_diag(*[torch.kron(left, step)] * edit.operand.copies)
    tensors["weight"] = (tensors["weight"].double() @ kernel).to(dtype)
    tensors["left_trans"], tensors["right_trans"] = left.to(dtype), step.to(dtype)


def unfolded(right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, *rest: Any) -> None:
    """The weight behind an online rotation stays as it was."""
    weight = tensors["weight"]
    right(leaf, tensors, edit, *rest)
    tensors["weight"] = weight


def tied(
    right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, values: Any, get: Any, dtype: torch.dtype
) -> None:
    """What is folded into the head goes into the embedding too, as if they still shared one tensor."""
    right(leaf, tensors, edit, values, get, dtype)
    if leaf.kind == "embedding":
        generator = torch.Generator().manual_seed(0)
        gain = 1 + 0.2 * torch.randn(tensors["weight"].shape[1], generator=generator, dtype=torch.float64)
        tensors["weight"] = tensors["weight"] * gain.to(dtype)


def head_of_the_embedding(right: Verbs, leaf: Leaf, tensors: Any, edit: Edit, *rest: Any) -> None:
    """The head keeps the tensor of the embedding, without the gain that belongs into it."""
    if not edit.site.module.endswith(("lm_head", "embed_out")):
        right(leaf, tensors, edit, *rest)


@contextmanager
def tiled() -> Iterator[None]:
    """The heads of a group at a distance from each other, instead of side by side."""

    def value(self: Vector, values: Any, dtype: torch.dtype) -> Tensor:
        vector = values[self.slot].to(dtype)
        vector = vector if self.groups is None else vector.repeat(self.repeat)
        return 1 / vector if self.inverse else vector

    with patch.object(Vector, "value", value):
        yield


def with_eps(change: Callable[[float], float]) -> Callable[[Plan], Plan]:
    """After the plan, the norms have another eps."""

    def changed(leaf: Leaf) -> Leaf:
        if leaf.norm is None:
            return leaf
        eps = leaf.norm.eps
        graph = fx.Graph()
        result = graph.graph_copy(leaf.graph, {})
        for node in graph.nodes:
            node.args = tuple(change(eps) if isinstance(a, float) and a == eps else a for a in node.args)
        graph.output(result)
        return replace(leaf, graph=graph)

    def mutate(plan: Plan) -> Plan:
        known: dict[int, Leaf] = {}
        leaves = {n: known.setdefault(id(leaf), changed(leaf)) for n, leaf in plan.final.leaves.items()}
        return replace(plan, final=replace(plan.final, leaves=leaves))

    return mutate


@dataclass(frozen=True, kw_only=True)
class ScaleKeys(Pass):
    """Multiply channels of the keys and divide those of the queries: right where both of a rope pair get one scale."""

    name = "scale_keys"
    summary = "move scales from queries to keys"
    patterns = ()
    requires = frozenset()
    provides = frozenset()
    breaks = frozenset()
    before: ClassVar = {}
    after: ClassVar = {}
    claim = EXACT

    pairs: bool = True

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per attention of a block."""
        rewrites = []
        for node in program.graph.nodes:
            if not is_attention(node):
                continue
            _, kv_heads, _, dim = shape(node.args[1])
            heads, name = shape(node.args[0])[1], str(node.meta["module"])
            slot = Slot(f"{name}/keys", (kv_heads, dim))
            scale = Vector(slot, groups=(kv_heads, dim))
            edits = (
                Edit(
                    Verb.SCALE_OUT,
                    Site(f"{name}.q_proj"),
                    replace(scale, inverse=True, repeat=heads // kv_heads),
                ),
                Edit(Verb.SCALE_OUT, Site(f"{name}.k_proj"), scale),
            )
            rewrites.append(Rewrite(self.name, "qk", name, edits, EXACT))
        return Answer(tuple(rewrites))

    def solve(self, rewrite: Rewrite, view: Any) -> Mapping[Slot, Tensor]:
        """Random scales between 0.5 and 1.5, the same for channels i and i + d/2 of a head."""
        (slot,) = rewrite.slots
        scale = torch.rand(slot.shape, generator=torch.Generator().manual_seed(0)) + 0.5
        if self.pairs:
            scale[:, slot.shape[1] // 2 :] = scale[:, : slot.shape[1] // 2]
        return {slot: scale}


QUAROT = "fuse_norms,rotate_residual"
MUTANTS = (
    Mutant("wrong side: a reader is rotated on its rows", RMS[:3], QUAROT, {Verb.ROTATE_IN: on_rows}),
    Mutant("wrong side: a writer is rotated on its columns", RMS[:3], QUAROT, {Verb.ROTATE_OUT: on_rows}),
    Mutant("wrong side: a reader is scaled on its rows", RMS[:3], SMOOTH, {Verb.SCALE_IN: on_rows}),
    Mutant("missed reader of a norm", RMS, SMOOTH, {Verb.SCALE_IN: forgets("k_proj")}),
    Mutant("missed reader of a product", RMS, SMOOTH, {Verb.SCALE_IN: forgets("down_proj")}),
    Mutant("missed reader of the residual stream", RMS, QUAROT, {Verb.ROTATE_IN: forgets("up_proj")}),
    Mutant("missed head", RMS, QUAROT, {Verb.ROTATE_IN: forgets("lm_head")}),
    Mutant("missed writer", RMS, SMOOTH, {Verb.SCALE_OUT: forgets("v_proj")}),
    Mutant("missed writer of the residual stream", RMS, QUAROT, {Verb.ROTATE_OUT: forgets("down_proj")}),
    Mutant("missed embedding", RMS, QUAROT, {Verb.ROTATE_OUT: forgets("embed_tokens")}),
    Mutant("transposed on the writers", RMS + LAYER_NORM, QUAROT, {Verb.ROTATE_OUT: transposed}),
    Mutant("transposed on the readers", RMS + LAYER_NORM, QUAROT, {Verb.ROTATE_IN: transposed}),
    Mutant("transposed in the heads", ("llama", "mistral", "qwen2"), "rotate_heads", {Verb.ROTATE_OUT: transposed}),
    Mutant(
        "heads turned by another matrix", ("llama", "mistral", "qwen2"), "rotate_heads",
        {Verb.ROTATE_IN: other(lambda q: replace(q, seed=q.seed + 1))},
    ),
    Mutant("inverse for inverse transpose", RMS[:3], ONLINE, {Verb.WRAP: inverse_for_inverse_transpose}),
    Mutant("transpose for inverse", RMS[:3], ONLINE, {Verb.WRAP: transpose_for_inverse_transpose}),
    Mutant("online rotation not folded back", RMS[:3], ONLINE, {Verb.WRAP: unfolded}),
    Mutant("gain folded without its offset", ("gemma", "qwen3_next", "nemotron"), "fuse_norms",
           {Verb.SCALE_IN: other(lambda gain: replace(gain, offset=0.0))}),
    Mutant("forgotten bias, scaled", ("qwen2", "gpt_neox", "opt"), "iter_smooth{enable_subgraph_type=ov}",
           {Verb.SCALE_OUT: without_bias}),
    Mutant("forgotten bias, rotated", LAYER_NORM[1:], QUAROT, {Verb.ROTATE_OUT: without_bias}),
    Mutant("forgotten bias of a norm, scaled", LAYER_NORM, "iter_smooth{enable_subgraph_type=norm-linear}",
           {Verb.SCALE_OUT: without_norm_bias}),
    Mutant("divided at neither end", RMS, SMOOTH, {Verb.SCALE_IN: other(lambda v: replace(v, inverse=False)),
                                                    Verb.SCALE_OUT: other(lambda v: replace(v, inverse=False))}),
    Mutant("wrong grouping of the heads", ("llama", "mistral", "qwen2"), "iter_smooth{enable_subgraph_type=ov}",
           also=tiled),
    Mutant("channels of a packed linear off by one", ("phi3", "gpt_neox", "glm"), SMOOTH,
           {Verb.SCALE_OUT: shifted_channels}),
    Mutant("rope pairs split", ("llama", "mistral", "qwen2"), [ScaleKeys(pairs=False)], also=ExitStack),
    Mutant("eps of the norms lost", RMS[:3] + LAYER_NORM[:2], "fuse_norms", plan=with_eps(lambda eps: 0.0)),
    Mutant("eps of the norms changed", RMS[:3] + LAYER_NORM[:2], "fuse_norms", plan=with_eps(lambda eps: eps * 10)),
    Mutant(
        "the all-ones direction moved under a LayerNorm", LAYER_NORM, QUAROT,
        {verb: other(lambda q: replace(q, keeps_ones=False)) for verb in (Verb.ROTATE_OUT, Verb.ROTATE_IN)},
    ),
    Mutant("tie not cut: the embedding gets the head's gain", ("gemma", "cohere", "starcoder2"), QUAROT,
           {Verb.ROTATE_OUT: tied}),
    Mutant("tie not cut: the head has the embedding's tensor", ("gemma", "cohere", "starcoder2"), QUAROT,
           {Verb.ROTATE_IN: head_of_the_embedding}),
    Mutant("shift not compensated", RMS, SHIFT, {Verb.SHIFT_IN: forgets("q_proj")}),
    Mutant("shift of the wrong sign", RMS, SHIFT, {Verb.SHIFT_OUT: negative}),
    Mutant("gain stays in the norm", RMS, "fuse_norms", {Verb.SET_UNIT: forgets("input_layernorm")}),
    Mutant("offset of a gain forgotten", ("gemma", "qwen3_next", "nemotron"), "fuse_norms",
           {Verb.SET_UNIT: without_offset}),
)  # fmt: skip
RIGHT = (QUAROT, SMOOTH, SHIFT, "rotate_heads", ONLINE, "fuse_norms")
"""What the mutants do wrong, done right: it has to be let through."""
