"""Programs for the engine's tests: drawn by hand op by op, or captured once from a family's config."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PretrainedConfig

import qc.compiler.attention  # noqa: F401  (registers the op that drawings use)
from qc.compiler.capture import capture
from qc.compiler.execute import execute, inputs_of
from qc.compiler.program import Leaf, Norm, Part, Program
from qc.compiler.source import InMemory
from qc.compiler.walk import Walk
from tests.families import ALL, build

aten = torch.ops.aten
BATCH, LENGTH = 2, 3


@cache
def captured(family: str) -> Program:
    """The program of a tiny config of a family, with random weights in memory; nobody edits it in place."""
    return capture(build(config_of(family)), certify=False)


def config_of(family: str) -> PretrainedConfig:
    """The tiny config of a family; ``llama-128`` has an MLP of 128, which the server splits into 8 x 16."""
    name, _, width = family.partition("-")
    config = ALL[name]()
    if width:
        config.intermediate_size = int(width)
    return config


def norm_graph(facts: Norm) -> fx.Graph:
    """The ops of a norm, as capture would list them."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_function
    centred = x
    if facts.mean_subtracting:
        centred = call(aten.sub.Tensor, (x, call(aten.mean.dim, (x, [-1], True))))
    square = call(aten.mean.dim, (call(aten.pow.Tensor_Scalar, (centred, 2)), [-1], True))
    result = call(
        aten.mul.Tensor, (centred, call(aten.rsqrt.default, (call(aten.add.Tensor, (square, facts.eps)),)))
    )
    for name, op in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if getattr(facts, name):
            operand = graph.get_attr(name)
            operand.meta["val"] = torch.empty(facts.width, device="meta")
            if name == "weight" and facts.offset:
                operand = call(aten.add.Tensor, (operand, facts.offset))
            result = call(op, (result, operand))
    graph.output(result)
    return graph


class Drawing:
    """A graph drawn node by node on meta, with random float64 weights; ``program`` closes it.

    Everything lies in one block between a prologue (embeddings and inputs) and an epilogue (the output).
    """

    def __init__(self, *, batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.leaves: dict[str, Leaf] = {}
        self.tensors: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.size = (batch, length)
        self.ids = self._input("input_ids")
        self._input("attention_mask")

    def _input(self, name: str) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta = {"val": torch.empty(self.size, dtype=torch.int64, device="meta"), "part": 0}
        return node

    def random(self, *size: int) -> Tensor:
        """Gaussian float64 numbers of this drawing."""
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def op(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """One op; its value on meta is computed."""
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta = {"val": target(*values[0], **values[1]), "part": 1}
        return node

    def op_of_list(self, node: fx.Node, index: int) -> fx.Node:
        """One of the values of an op that returns several."""
        item = self.graph.call_function(operator.getitem, (node, index))
        item.meta = {"val": node.meta["val"][index], "part": 1}
        return item

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A parameter that no leaf owns."""
        node = self.graph.create_node("get_attr", name)
        node.meta = {"val": value.to("meta"), "part": 1}
        self.tensors[name] = value
        return node

    def value(self, name: str, *size: int) -> fx.Node:
        """A random value that nothing computes."""
        return self.constant(name, self.random(*size))

    def _leaf(self, name: str, leaf: Leaf, x: fx.Node, size: tuple[int, ...], part: int) -> fx.Node:
        self.leaves[name] = leaf
        parent = self.root
        for piece in name.split(".")[:-1]:
            if not hasattr(parent, piece):
                parent.add_module(piece, nn.Module())
            parent = parent.get_submodule(piece)
        module = nn.Module()
        for local, shape in leaf.parameters.items():
            module.register_parameter(
                local, nn.Parameter(torch.empty(shape, device="meta", dtype=torch.float64))
            )
            self.tensors[f"{name}.{local}"] = self.random(*shape)
        parent.add_module(name.split(".")[-1], module)
        node = self.graph.create_node("call_module", name, (x,))
        node.meta = {"val": torch.empty(size, dtype=torch.float64, device="meta"), "part": part}
        return node

    def embedding(self, name: str, rows: int, width: int, ids: fx.Node | None = None) -> fx.Node:
        """An embedding of token ids."""
        leaf = Leaf("embedding", fx.Graph(), {"weight": (rows, width)})
        return self._leaf(name, leaf, ids or self.ids, (*self.size, width), 0)

    def linear(
        self, name: str, x: fx.Node, width: int, *, bias: bool = False, transposed: bool = False
    ) -> fx.Node:
        """A linear with ``width`` outputs."""
        size = tuple(x.meta["val"].shape)
        weight = (size[-1], width) if transposed else (width, size[-1])
        parameters = {"weight": weight} | ({"bias": (width,)} if bias or transposed else {})
        leaf = Leaf("linear", fx.Graph(), parameters, transposed=transposed)
        return self._leaf(name, leaf, x, (*size[:-1], width), 1)

    def norm(
        self, name: str, x: fx.Node, *, mean: bool = False, offset: float = 0.0, bias: bool = False,
        weight: bool = True, width: int | None = None,
    ) -> fx.Node:  # fmt: skip
        """An RMS norm, or another kind of norm."""
        size = tuple(x.meta["val"].shape)
        facts = Norm(mean, offset, bias, weight, 1e-6, width or size[-1])
        parameters = {key: (facts.width,) for key, there in (("weight", weight), ("bias", bias)) if there}
        return self._leaf(name, Leaf("norm", norm_graph(facts), parameters, facts), x, size, 1)

    def opaque(self, name: str, x: fx.Node) -> fx.Node:
        """A module that is a box."""
        return self._leaf(name, Leaf("opaque", fx.Graph(), {}), x, tuple(x.meta["val"].shape), 1)

    def heads(self, x: fx.Node, heads: int) -> fx.Node:
        """[b, s, h·d] as [b, h, s, d]."""
        batch, length = self.size
        return self.op(aten.transpose.int, self.op(aten.view.default, x, [batch, length, heads, -1]), 1, 2)

    def attention(self, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
        """Attention of heads, [b, s, h, d]."""
        return self.op(torch.ops.qc.attention.default, q, k, v, None, 0.5)

    def flat(self, x: fx.Node) -> fx.Node:
        """[b, s, h, d] as [b, s, h·d]."""
        return self.op(aten.reshape.default, x, [*self.size, -1])

    def program(self, output: fx.Node) -> Program:
        """The finished program."""
        node = self.graph.output(output)
        node.meta = {"part": 2, "val": output.meta["val"]}
        for index, inner in enumerate(self.graph.nodes):
            inner.meta.setdefault("part", min(index, 1))
        parts = (Part("prologue", 0, -1), Part("block", 1, 0), Part("epilogue", 2, -1))
        return Program(self.graph, self.root, self.leaves, parts, InMemory(self.tensors), torch.float64)


def llama(
    drawing: Drawing, prefix: str, x: fx.Node, *, heads: int = 4, kv: int = 2, head_dim: int = 4
) -> fx.Node:
    """A decoder layer with Llama's wiring and Llama's names (without rotary embedding)."""
    d, width = drawing, x.meta["val"].shape[-1]
    n = d.norm(f"{prefix}.input_layernorm", x)
    q = d.heads(d.linear(f"{prefix}.self_attn.q_proj", n, heads * head_dim), heads)
    k = d.heads(d.linear(f"{prefix}.self_attn.k_proj", n, kv * head_dim), kv)
    v = d.heads(d.linear(f"{prefix}.self_attn.v_proj", n, kv * head_dim), kv)
    o = d.linear(f"{prefix}.self_attn.o_proj", d.flat(d.attention(q, k, v)), width)
    x = d.op(aten.add.Tensor, x, o)
    n = d.norm(f"{prefix}.post_attention_layernorm", x)
    gate = d.op(aten.silu.default, d.linear(f"{prefix}.mlp.gate_proj", n, 24))
    product = d.op(aten.mul.Tensor, gate, d.linear(f"{prefix}.mlp.up_proj", n, 24))
    return d.op(aten.add.Tensor, x, d.linear(f"{prefix}.mlp.down_proj", product, width))


def run_float64(program: Program, tensors: Mapping[str, Tensor], ids: Tensor | None = None) -> Tensor:
    """What a program returns on token ids (zeros by default), all in float64, with these tensors."""
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64) if ids is None else ids
    env: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    nodes = {node.name: node for node in program.graph.nodes}
    with torch.no_grad():
        for part in program.parts:
            given = {node: env[node.name] for node in inputs_of(program, part)}
            found = execute(program, part, tensors, given, dtype=torch.float64)
            env |= {node.name: value for node, value in found.items()}
    (output,) = (node for node in nodes.values() if node.op == "output")
    return env[output.args[0].name]


def relative(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error."""
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))


def one_linear(x: Tensor) -> Walk:
    """A walk over a block that is one linear called ``w``, which reads ``x`` in every microbatch."""
    graph = fx.Graph()
    source = graph.placeholder("x")
    return Walk([graph.call_module("w", (source,))], lambda index: {source: x}, lambda *given: {})
