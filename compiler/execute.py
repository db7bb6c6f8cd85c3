"""Run a Program, a part at a time, on tensors that the caller holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from .attention import attend
from .errors import Failed, Refused
from .experts import COMBINED
from .interpret import Semantics, arguments, call, interpret
from .program import Leaf, Part, Program
from .stretch import STRETCH, InFloat64, run_stretch

ATTENTION = torch.ops.qc.attention.default

Observer = Callable[[fx.Node, tuple[Any, ...], Any], None]


Route = Callable[[str, Tensor, int], Tensor]
"""``route(node, index [n, k], experts)``: the experts [n, k] of each row instead of those in ``index``."""


class LinearHook(Protocol):
    """What may run in the place of a linear leaf."""

    def __call__(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, /) -> Tensor:
        """The linear ``name`` on x [..., in], with weight [out, in] and bias [out] as they were handed in."""
        ...


def _of(program: Program, nodes: Part | Iterable[fx.Node]) -> list[fx.Node]:
    return list(program.nodes(nodes) if isinstance(nodes, Part) else nodes)


def inputs_of(program: Program, part: Part | Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """Values that the nodes read and do not compute, by first use; of the prologue, the placeholders."""
    nodes = _of(program, part)
    inside = {n for n in nodes if n.op != "placeholder"}
    own = [n for n in nodes if n.op == "placeholder"]
    read = (s for n in nodes for s in n.all_input_nodes if s not in inside)
    return tuple(dict.fromkeys([*own, *read]))


def outputs_of(program: Program, part: Part | Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """Values that the nodes compute and others read, in graph order; of the epilogue, the logits."""
    nodes = _of(program, part)
    inside = {n for n in nodes if n.op != "output"}
    return tuple(
        n
        for n in nodes
        if n.op not in ("output", "placeholder") and any(user not in inside for user in n.users)
    )


def parameters_of(program: Program, part: Part | Iterable[fx.Node]) -> tuple[str, ...]:
    """Names, as the source knows them, of the parameters and persistent buffers that the nodes need."""
    names: dict[str, None] = {}
    for node in _of(program, part):
        if node.op == "get_attr" and node.target not in program.constants:
            names[program.parameter(str(node.target))] = None
        elif node.op == "call_module":
            for local in _state(program, str(node.target)):
                if local not in program.constants:
                    names[program.parameter(local)] = None
    return tuple(names)


def _state(program: Program, name: str) -> dict[str, Tensor]:
    """Qualified names of a module's parameters and buffers, with their meta tensors."""
    module = program.root.get_submodule(name)
    local = dict(module.named_parameters()) | dict(module.named_buffers())
    return {f"{name}.{key}": tensor for key, tensor in local.items()}


class _Run:
    """One execution: where tensors come from and how dtypes are read."""

    def __init__(
        self, program: Program, tensors: Mapping[str, Tensor], semantics: Semantics, linear: LinearHook | None
    ) -> None:
        self.program, self.tensors, self.semantics, self.linear = program, tensors, semantics, linear

    def raw(self, name: str) -> Tensor:
        """The tensor of a qualified name, as the caller holds it."""
        owner = self.program.parameter(name)
        found = self.tensors.get(name)
        if found is None and owner != name:
            found = self.tensors.get(owner)
        if found is None:
            found = self.program.constants.get(name)
        if found is None:
            raise Failed(
                f"no tensor was given for {name}" + (f" (stored as {owner})" if owner != name else "")
            )
        return found.to(self.semantics.device)

    def get(self, name: str, declared: torch.dtype) -> Tensor:
        """The tensor of a qualified name, in the dtype of execution."""
        return self.semantics.tensor(self.raw(name), declared)

    def declared(self, name: str) -> torch.dtype:
        """The dtype in which the model holds a parameter; a router may be float32 in a bfloat16 model."""
        known = self.program.memory.setdefault("dtypes", {})
        if name not in known:
            module, _, local = name.rpartition(".")
            known[name] = getattr(self.program.root.get_submodule(module), local).dtype
        return known[name]

    def attribute(self, node: fx.Node) -> Tensor:
        """The value of a get_attr node."""
        return self.get(str(node.target), node.meta["val"].dtype)

    def stretch(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Tensor:
        """The value of a stretch of a module's own code."""
        name, index, tensors, outs = fx.map_arg(node.args, lambda n: env[n])
        module, known = self.program.root.get_submodule(name), self.program.stretches[name]
        if self.semantics.dtype != torch.float64:
            return run_stretch(module, known, index, tensors, outs)
        with InFloat64():
            return run_stretch(module, known, index, tensors, outs)

    def leaf(self, node: fx.Node, leaf: Leaf, args: tuple[Any, ...]) -> Tensor:
        """The value of a call_module node."""
        name = str(node.target)
        if leaf.kind == "linear":
            return self._linear(name, leaf, args[0])
        state = {n.removeprefix(f"{name}."): t for n, t in _state(self.program, name).items()}
        tensors = {local: self.get(f"{name}.{local}", meta.dtype) for local, meta in state.items()}
        if leaf.kind == "embedding":
            return _look_up(name, args[0], tensors["weight"])
        if self.semantics.dtype == torch.float64:
            return interpret(leaf.graph, args, tensors, self.semantics)
        module = self.program.root.get_submodule(name)
        return torch.func.functional_call(module, tensors, args, strict=True)

    def _linear(self, name: str, leaf: Leaf, x: Tensor) -> Tensor:
        has_bias = "bias" in leaf.parameters or f"{name}.bias" in self.tensors
        if self.linear is not None:
            weight = self.raw(f"{name}.weight")
            bias = self.raw(f"{name}.bias") if has_bias else None
            return self.linear(name, x, weight.t() if leaf.transposed else weight, bias)
        if leaf.written_out:
            held = {local: self.raw(f"{name}.{local}") for local in leaf.parameters}
            tensors = {n: self.semantics.tensor(t, self.declared(f"{name}.{n}")) for n, t in held.items()}
            return interpret(leaf.graph, (x,), tensors, self.semantics)
        declared = self.declared(f"{name}.weight")
        weight = self.semantics.tensor(self.raw(f"{name}.weight"), declared)
        bias = self.semantics.tensor(self.raw(f"{name}.bias"), declared) if has_bias else None
        if not leaf.transposed:
            return F.linear(x, weight, bias)
        assert bias is not None
        rows = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
        return rows.view(*x.shape[:-1], weight.shape[1])


def execute(
    program: Program,
    nodes_or_part: Part | Iterable[fx.Node],
    tensors: Mapping[str, Tensor],
    env: Mapping[fx.Node, Any],
    *,
    dtype: torch.dtype,
    linear: LinearHook | None = None,
    on_value: Observer | None = None,
    route: Route | None = None,
) -> dict[fx.Node, Any]:
    """Run nodes in order and return the values that others read.

    Args:
        program: The program that the nodes are of, as captured or rewritten.
        nodes_or_part: A part, or nodes in graph order.
        tensors: Parameters and persistent buffers by qualified name, in any dtype; a tied one under its own
            name or its owner's. They are cast to the dtype of execution where the model declares its own
            dtype.
        env: Values from outside: the placeholders, and what earlier parts computed. It is not changed.
        dtype: The dtype of execution. Baked casts to the captured dtype become casts to it; other casts stay,
            but for float64, in which every float is float64 and leaves run from their graphs, so that
            nothing is rounded to float32 inside. In any other dtype norms and opaque leaves are the real
            modules, so that results are those of the model bit for bit.
        linear: Runs in the place of every linear leaf (fake quantization, training).
        on_value: Called after each node with the node, the values of ``node.all_input_nodes`` and its value.
        route: Says which rows go to which expert, given what the router says.

    Returns:
        The value of each node that another node outside reads (of the epilogue: the logits). All other
        values are freed after their last use.

    Raises:
        Failed: A parameter or an outside value is missing.
    """
    nodes = _of(program, nodes_or_part)
    device = next((v.device for v in env.values() if isinstance(v, Tensor)), torch.device("cpu"))
    run = _Run(program, tensors, Semantics(program.dtype, dtype, device), linear)
    kept = set(outputs_of(program, nodes))
    last = {source: node for node in nodes for source in node.all_input_nodes}
    local: dict[fx.Node, Any] = dict(env)
    chosen = _choices(nodes) if route is not None else {}
    for node in nodes:
        if node.op == "output" or (node.op == "placeholder" and node in local):
            continue
        missing = [s for s in node.all_input_nodes if s not in local] or (
            [node] if node.op == "placeholder" else []
        )
        if missing:
            raise Failed(f"{node.name} needs the value of {missing[0].name}, which was not given")
        local[node] = _value(run, node, local)
        if route is not None and node in chosen:
            local[node] = route(node.name, local[node], chosen[node])
        if on_value is not None:
            on_value(node, tuple(local[s] for s in node.all_input_nodes), local[node])
        for source in node.all_input_nodes:
            if last[source] is node and source not in kept:
                del local[source]
    return {node: local[node] for node in nodes if node in kept}


def _choices(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """The values that say which rows go to which expert, with the number of experts."""
    return {
        node: len(user.args[2])  # type: ignore[arg-type]
        for node in nodes for user in node.users
        if user.target is COMBINED and user.args[0] is node
    }  # fmt: skip


def in_turn(name: str, index: Tensor, experts: int) -> Tensor:
    """A ``Route`` that takes all experts in turn, so that each is run."""
    turn = torch.arange(index.numel(), device=index.device).view(index.shape)
    return turn.remainder(experts).to(index.dtype)


def _look_up(name: str, index: Tensor, table: Tensor) -> Tensor:
    """Rows of a table; Refused where it has too few."""
    highest = int(index.max()) if index.numel() else 0
    if highest >= len(table):
        raise Refused(
            f"{name} has {len(table)} rows, and row {highest} is looked up: if it holds positions, choose a smaller"
            " --length; if it holds tokens, the tokenizer belongs to another model"
        )
    return F.embedding(index, table)


def _value(run: _Run, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return run.attribute(node)
    if node.op == "call_module":
        leaf = run.program.leaf(node)
        if leaf is None:
            raise Failed(f"{node.target} is called but is no leaf of the program")
        return run.leaf(node, leaf, tuple(env[a] if isinstance(a, fx.Node) else a for a in node.args))
    if node.target is STRETCH:
        return run.stretch(node, env)
    if node.target is ATTENTION and torch.is_grad_enabled():  # the op would run it again in its backward pass
        args, kwargs = arguments(node, env, run.semantics)
        return attend(*args, **kwargs)
    return call(node, env, run.semantics)


def inputs(
    program: Program, input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[fx.Node, Tensor]:
    """Values of the placeholders for token ids [b, s] and a mask [b, s] (all ones by default)."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    given = {"input_ids": input_ids, "attention_mask": mask}
    return {n: given[str(n.target)] for n in program.graph.nodes if n.op == "placeholder"}


def run(
    program: Program,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    dtype: torch.dtype,
    tensors: Mapping[str, Tensor] | None = None,
    linear: LinearHook | None = None,
    on_value: Observer | None = None,
) -> Tensor:
    """Logits [b, s, vocabulary] of the whole model, part by part; weights are loaded per part and dropped.

    ``tensors`` stand in for the source where they have a name. Gradients flow to them where grad is enabled.
    """
    env: dict[fx.Node, Any] = dict(inputs(program, input_ids, attention_mask))
    given = tensors or {}
    for part in program.parts:
        missing = [name for name in parameters_of(program, part) if name not in given]
        state = {**program.source.load(missing), **given}
        env |= execute(program, part, state, env, dtype=dtype, linear=linear, on_value=on_value)
        env = {n: v for n, v in env.items() if any(u.meta["part"] > part.index for u in n.users) or _final(n)}
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    return env[output.args[0]]


def _final(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)
