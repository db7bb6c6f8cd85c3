"""Laws: which maps of a value's channels may be moved across an op, and what must come along.

One row per op. A *map* acts on channels: a positive scale per channel, a rotation of the whole channel axis,
or one matrix per attention head. A law answers for one operand of one node: the map passes to the output
(``Passes``, perhaps if other operands carry it too), or it does not (``Blocks``, with the reason).

Sources: SmoothQuant (arXiv 2211.10438) for scales, QuaRot (arXiv 2404.00456) for rotations, SpinQuant
(arXiv 2405.16406) for head rotations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from . import registry
from .canon import hint
from .errors import Refused
from .experts import COMBINED, ROUTED
from .program import Leaf, Program

aten = torch.ops.aten


class Map(Enum):
    """What is to be moved."""

    SCALE = "a positive scale per channel"
    ROTATION = "a rotation of the channel axis"
    CENTRED = "a rotation of the channel axis that keeps the all-ones vector"
    HEAD = "a matrix per attention head"


ROTATIONS = (Map.ROTATION, Map.CENTRED)


@dataclass(frozen=True)
class Passes:
    """The map goes through; ``joins`` are the other operands that must carry the same map."""

    joins: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Blocks:
    """The map does not go through."""

    reason: str


Law = Callable[[Program, fx.Node, fx.Node, Map], Passes | Blocks]
"""``law(program, node, operand, map)``."""


def is_tensor(node: Any) -> bool:
    """Whether an argument is a node with a tensor value."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape(node: fx.Node) -> tuple[int, ...]:
    """Concrete shape of a node's value: symbolic sizes are replaced by the example's sizes."""
    return tuple(hint(size) for size in node.meta["val"].shape)


def operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """Tensor operands, also those inside lists, in order."""
    return tuple(arg for arg in node.all_input_nodes if is_tensor(arg))


def everything(program: Program, node: fx.Node, operand: fx.Node, what: Map) -> Passes | Blocks:
    """Casts, copies, sign changes: each channel keeps to itself and is only multiplied by one constant."""
    return Passes()


def layout(program: Program, node: fx.Node, operand: fx.Node, what: Map) -> Passes | Blocks:
    """Views and selections move channels about; where each went is known by running them on labels.

    A rotation mixes all channels, so it passes only where the channel axis stays whole and last.
    """
    if node.args[0] is not operand:
        return Blocks("it says which values are taken, and is not one of them")
    if what not in ROTATIONS:
        return Passes()
    if not isinstance(node.meta.get("val"), torch.Tensor) or shape(node)[-1:] != shape(operand)[-1:]:
        return Blocks("the channel axis is cut or moved")
    if node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return Passes()
    if node.target in ROW_LAYOUT and _on_rows(node, len(shape(operand))):
        return Passes()
    return Blocks("the channel axis may have moved")


def _on_rows(node: fx.Node, axes: int) -> bool:
    """Whether a slice, selection or squeeze of a value with so many axes leaves the last one alone."""
    where: Any = node.args[1] if len(node.args) > 1 else 0
    if node.target is aten.index.Tensor:
        return len(where) < axes
    if node.target is aten.expand.default:
        return True
    if node.target is aten.unsqueeze.default:
        return where % (axes + 1) < axes
    return where % axes < axes - 1


def add(program: Program, node: fx.Node, operand: fx.Node, what: Map) -> Passes | Blocks:
    """Sums are linear: every summand must carry the map. One number for all channels is a multiple of all-ones."""
    others = tuple(arg for arg in operands(node) if arg is not operand)
    if what is Map.CENTRED and node.args.count(operand) == 1 and shape(operand)[-1:] == shape(node)[-1:]:
        return Passes(joins=tuple(other for other in others if shape(other)[-1:] not in ((), (1,))))
    if not others:
        doubled = sum(arg is operand for arg in node.args) > 1
        return Passes() if doubled else Blocks("a constant is added, which would have to be mapped too")
    if any(shape(other)[-1:] != shape(operand)[-1:] for other in others):
        return Blocks("what is added is broadcast over the channels")
    return Passes(joins=others)


def mul(program: Program, node: fx.Node, operand: fx.Node, what: Map) -> Passes | Blocks:
    """A product lets a scale of one factor out, and any map when the other factor is one number."""
    if node.args.count(operand) > 1:
        return Blocks("the value is multiplied by itself")
    others = [arg for arg in node.args[:2] if arg is not operand]
    if all(not is_tensor(other) for other in others):
        return Passes()
    if all(shape(other)[-1:] in ((), (1,)) for other in others if is_tensor(other)):
        return Passes()  # one factor per row, the same for all channels
    if what is Map.SCALE:
        return Passes()
    return Blocks("it is multiplied channel by channel, and a rotation does not commute with that")


def div(program: Program, node: fx.Node, operand: fx.Node, what: Map) -> Passes | Blocks:
    """As a product, in the numerator."""
    if node.args[0] is not operand:
        return Blocks("it is divided by")
    return mul(program, node, operand, what)


def relu(program: Program, node: fx.Node, operand: fx.Node, what: Map) -> Passes | Blocks:
    """relu(s x) = s relu(x) for s > 0."""
    return Passes() if what is Map.SCALE else Blocks("relu lets only positive scales through")


def attention(program: Program, node: fx.Node, operand: fx.Node, what: Map) -> Passes | Blocks:
    """Attention is linear in its values, head by head; q and k it sees only through their products."""
    if node.args.count(operand) > 1 or node.args[2] is not operand:
        return Blocks("attention sees it only through the scores")
    return Passes() if what not in ROTATIONS else Blocks("attention keeps heads apart")


def routed(program: Program, node: fx.Node, operand: fx.Node, what: Map) -> Passes | Blocks:
    """Rows that are sent to one expert keep their channels."""
    return Passes() if node.args[0] is operand else Blocks("it says which rows go to which expert")


def combined(program: Program, node: fx.Node, operand: fx.Node, what: Map) -> Passes | Blocks:
    """A sum over experts, each times one number per row: every expert must carry the map."""
    ys = node.args[2]
    assert isinstance(ys, list | tuple)
    if operand not in ys:
        return Blocks("it says how much each expert counts")
    return Passes(joins=tuple(y for y in ys if isinstance(y, fx.Node) and y is not operand))


ROW_LAYOUT = (
    aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten.index.Tensor,
    aten.expand.default,
)  # fmt: skip
"""Layout ops that, with the width unchanged, act on the rows."""

EVERYTHING = (aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.neg.default)
LAYOUT = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int,
    aten.permute.default, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
    aten.split.sizes, aten.chunk.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.select.int, aten.flatten.using_ints, aten.unflatten.int, aten.unbind.int, aten.index.Tensor,
    aten.t.default, aten.movedim.int, operator.getitem,
)  # fmt: skip

LAWS: Mapping[Any, Law] = {
    **dict.fromkeys(EVERYTHING, everything),
    **dict.fromkeys(LAYOUT, layout),
    aten.add.Tensor: add,
    aten.add_.Tensor: add,
    aten.sub.Tensor: add,
    aten.mul.Tensor: mul,
    aten.mul.Scalar: mul,
    aten.mul_.Tensor: mul,
    aten.mul_.Scalar: mul,
    aten.div.Tensor: div,
    aten.div.Scalar: div,
    aten.relu.default: relu,
    ROUTED: routed,
    COMBINED: combined,
}
"""The law of each op that lets anything through. An op that is not here, nor in a plug-in, lets nothing through."""


ATTENTIONS = {"qc.attention", "aten.scaled_dot_product_attention"}
OURS = {str(target.overloadpacket) for target in LAWS if hasattr(target, "overloadpacket")} | ATTENTIONS
"""Names of the ops that have a law here, as ``op_name`` gives them."""


def law(program: Program, node: fx.Node, operand: fx.Node, what: Map) -> Passes | Blocks:
    """Whether ``what`` on ``operand`` may be moved across ``node``. Leaves with weights are judged here too."""
    if is_attention(node):
        return attention(program, node, operand, what)
    leaf = program.leaf(node)
    if leaf is not None:
        if leaf.kind == "norm" and what in ROTATIONS:
            return norm(program, node, operand, what)
        return Blocks(f"{node.target} ({leaf.kind}) does not let it through")
    known = LAWS.get(node.target) or of_plug_in(op_name(node))
    if known is None:
        return Blocks(f"no law lets {what.value} through {op_name(node)}")
    return known(program, node, operand, what)


def of_plug_in(op: str) -> Law | None:
    """The law that a package registers for an op of its own (entry points ``qc.laws``, each named as the op is).

    Raises:
        Refused: A package registers a law for an op that has one here.
    """
    registered = registry.names("laws")
    for name in sorted(OURS & set(registered)):
        raise Refused(
            f"law {name!r} of {registry.package(registered[name])}: qc has the law of that op. A package adds laws"
            f" for ops that have none: mend {registry.package(registered[name])}, or uninstall it"
        )
    return registry.get("laws", op) if op in registered else None


def norm(program: Program, node: fx.Node, operand: fx.Node, what: Map) -> Passes | Blocks:
    """A norm over all channels lets a rotation through once its gain is one everywhere.

    One that subtracts the mean asks for a rotation that keeps the all-ones vector. A bias is added behind it: the
    norm then writes its bias into the space, see ``writes``.
    """
    facts = program.leaves[str(node.target)].norm
    assert facts is not None
    if facts.mean_subtracting and what is not Map.CENTRED:
        return Blocks(
            f"{node.target} subtracts the mean, which only rotations that keep the all-ones vector allow"
        )
    if facts.width != shape(operand)[-1]:
        return Blocks(f"{node.target} normalises {facts.width} of {shape(operand)[-1]} channels")
    if facts.weight and not node.meta.get("unit"):
        return Blocks(f"{node.target} multiplies by its gain: fuse it into its readers first (fuse_norms)")
    return Passes()


def writes(leaf: Leaf) -> bool:
    """Whether a leaf adds channels of its own to a space: a linear, an embedding, the bias of a norm."""
    return leaf.kind in ("linear", "embedding") or (leaf.norm is not None and leaf.norm.bias)


def is_attention(node: Any) -> bool:
    """Whether a node is ``qc::attention`` or torch's own scaled dot product attention."""
    return isinstance(node, fx.Node) and op_name(node) in ATTENTIONS


def op_name(node: fx.Node) -> str:
    """``aten.mul`` for an op, the qualified name for a module."""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        return str(packet)
    return str(getattr(target, "__name__", target))
