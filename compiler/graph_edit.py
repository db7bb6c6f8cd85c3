"""The graph side of edits: what a plan can show before any weight is there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from ..runtime.attention_grid import GRIDS
from ..runtime.divided import LEAF, divided
from ..runtime.kronecker import rotate
from ..runtime.low_rank import FACTORS, low_rank
from .contract import Rewrite
from .edit import Verb
from .operand import Divisor, Hadamard, Kronecker, LowRank, Quantize, Stub, Weight
from .program import Program


def rewritten(program: Program, rewrites: tuple[Rewrite, ...]) -> Program:
    """A fork of the program with the graph side of all edits applied, and broken ties removed."""
    fork = program.fork()
    nodes: dict[str, list[fx.Node]] = {}
    for node in fork.graph.nodes:
        if node.op == "call_module":
            nodes.setdefault(str(node.target), []).append(node)
    touched: set[str] = set()
    for rewrite in rewrites:
        for edit in rewrite.edits:
            if isinstance(edit.operand, Stub):
                _insert_stub(fork, edit.site.module, edit.operand)
                continue
            for node in nodes[edit.site.module]:
                _on_node(fork, node, edit.verb, edit.operand, rewrite)
            touched.add(edit.site.module)
    ties = {name: owner for name, owner in fork.ties.items() if not {_module(name), _module(owner)} & touched}
    return replace(fork, ties=ties)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _on_node(program: Program, node: fx.Node, verb: Verb, operand: object, rewrite: Rewrite) -> None:
    leaf = program.leaf(node)
    assert leaf is not None
    if verb is not Verb.SWAP:  # which leaves a note
        shown = f" {operand}" if isinstance(operand, Hadamard | Kronecker | LowRank) else ""
        said = f"{rewrite.pass_name} {verb.name.lower()}{shown}"
        node.meta["edits"] = (*node.meta.get("edits", ()), said)
    if verb is Verb.SET_UNIT:
        node.meta["unit"] = True
    elif verb is Verb.SCALE_OUT and leaf.norm is not None:
        node.meta["unit"] = False
    elif verb is Verb.SHIFT_OUT and not node.meta.get("shifted"):
        _insert_bias(program, node)
    elif verb is Verb.SHIFT_IN and "bias" not in leaf.parameters:
        node.meta["bias_from"] = rewrite.pass_name
    elif verb is Verb.WRAP:
        assert isinstance(operand, Kronecker)
        _insert_rotation(program, node, operand)
    elif verb is Verb.DIVIDE:
        assert isinstance(operand, Divisor)
        _insert_division(program, node, operand)
    elif verb is Verb.BRANCH:
        assert isinstance(operand, LowRank)
        _insert_branch(program, node, operand)
    elif verb is Verb.SET_WEIGHT:
        assert isinstance(operand, Weight)
        node.meta["stored_as"] = operand.type
        node.meta["note"] = operand.type
    elif verb is Verb.SWAP:
        assert isinstance(operand, Quantize)
        node.meta["scheme"] = operand.scheme
        node.meta["note"] = str(operand.scheme)


def _insert_bias(program: Program, node: fx.Node) -> None:
    """``y = norm(x) + bias`` with a bias of its own, where the norm has none."""
    leaf = program.leaf(node)
    assert leaf is not None
    assert leaf.norm is not None
    node.meta["shifted"] = True
    if leaf.norm.bias:
        return
    with program.graph.inserting_after(node):
        bias = program.graph.create_node("get_attr", f"{node.target}.bias")
    with program.graph.inserting_after(bias):
        total = program.graph.call_function(torch.ops.aten.add.Tensor, (node, bias))
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    value = node.meta["val"]
    bias.meta = {"part": node.meta["part"], "val": value.new_empty((leaf.norm.width,))}
    total.meta = {"part": node.meta["part"], "val": value, "note": "norm bias"}


def _insert_rotation(program: Program, node: fx.Node, rotation: Kronecker) -> None:
    """``linear(x)`` becomes ``linear(rotate(x, left, right))``."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    with program.graph.inserting_before(node):
        left = program.graph.create_node("get_attr", f"{node.target}.left_trans")
        right = program.graph.create_node("get_attr", f"{node.target}.right_trans")
        rotated = program.graph.call_function(rotate, (source, left, right))
    node.replace_input_with(source, rotated)
    part, value = node.meta["part"], source.meta["val"]
    left.meta = {"part": part, "val": value.new_empty((rotation.left, rotation.left))}
    right.meta = {"part": part, "val": value.new_empty((rotation.right, rotation.right))}
    rotated.meta = {"part": part, "val": value, "note": f"online {rotation}"}
    node.meta["rotated"] = rotation


def _insert_division(program: Program, node: fx.Node, divisor: Divisor) -> None:
    """``linear(x)`` becomes ``linear(x * reciprocal)``."""
    source, part = node.args[0], node.meta["part"]
    assert isinstance(source, fx.Node)
    value = source.meta["val"]
    with program.graph.inserting_before(node):
        held = program.graph.create_node("get_attr", f"{node.target}.{LEAF}")
        scaled = program.graph.call_function(divided, (source, held))
    node.replace_input_with(source, scaled)
    held.meta = {"part": part, "val": value.new_empty(divisor.slot.shape)}
    scaled.meta = {"part": part, "val": value, "note": "online division"}
    node.meta["divided"] = True


def _insert_branch(program: Program, node: fx.Node, branch: LowRank) -> None:
    """``linear(x)`` becomes ``linear(x) + low_rank(x, l1, l2)``."""
    source, part, value = node.args[0], node.meta["part"], node.meta["val"]
    assert isinstance(source, fx.Node)
    with program.graph.inserting_before(node):
        held = [program.graph.create_node("get_attr", f"{node.target}.{leaf}") for leaf in FACTORS]
    for one, slot in zip(held, (branch.first, branch.second), strict=True):
        one.meta = {"part": part, "val": value.new_empty(slot.shape)}
    with program.graph.inserting_after(node):
        beside = program.graph.call_function(low_rank, (source, *held))
    with program.graph.inserting_after(beside):
        total = program.graph.call_function(torch.ops.aten.add.Tensor, (node, beside))
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    beside.meta = {"part": part, "val": value, "note": f"branch of {branch}"}
    total.meta = {"part": part, "val": value}
    node.meta["branch"] = branch


def _insert_stub(program: Program, module: str, stub: Stub) -> None:
    """``attention(.., x, ..)`` becomes ``attention(.., grid(x, scale, offset), ..)``."""
    node = next(node for node in program.graph.nodes if node.name == stub.node)
    source = node.args[stub.operand]
    assert isinstance(source, fx.Node)
    part, value = node.meta["part"], source.meta["val"]
    size = stub.slot.shape[1:]
    shape = (*size, 1) if stub.scope == "head" else size
    with program.graph.inserting_before(node):
        held = [program.graph.create_node("get_attr", f"{module}.{leaf}") for leaf in stub.leaves]
        grid = program.graph.call_function(GRIDS[stub.scope], (source, *held))
    for one in held:
        one.meta = {"part": part, "val": value.new_empty(shape, dtype=torch.float32), "stub": True}
    what = "cached" if stub.kind == "cache" else "attention reads"
    grid.meta = {"part": part, "val": value, "note": f"{what} {'qkv'[stub.operand]} {stub}"}
    node.args = tuple(grid if i == stub.operand else arg for i, arg in enumerate(node.args))
