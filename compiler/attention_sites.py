"""Attentions of a program as sites: which node, which module, how many heads, who writes q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .flow import feeding
from .laws import is_attention, shape
from .program import Program

NONE = (
    "no attention of the model could be found: its code writes attention out (products and a softmax), or it has none,"
    " and so there is no place for a grid"
)


@dataclass(frozen=True)
class AttentionSite:
    """One attention."""

    node: str
    """Its name in the graph."""
    module: str
    """The module that holds the linears from which q, k and v are computed."""
    heads: int
    kv_heads: int
    head_dim: int
    """Channels of a head of q and k."""
    value_dim: int
    """Channels of a head of v."""
    writers: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    """The linears from which q, k and v are computed, nearest first."""
    part: int

    def sizes(self, operand: int) -> tuple[int, int]:
        """Heads and channels per head of q (0), k (1) or v (2)."""
        heads = self.heads if operand == 0 else self.kv_heads
        return heads, self.value_dim if operand == 2 else self.head_dim


def attention_sites(program: Program) -> tuple[AttentionSite, ...]:
    """The attentions inside blocks, in graph order."""
    blocks = {part.index for part in program.blocks}
    return tuple(
        _site(program, node)
        for node in program.graph.nodes
        if is_attention(node) and node.meta.get("part") in blocks
    )


def _site(program: Program, node: fx.Node) -> AttentionSite:
    q, k, v = (operand for operand in node.args[:3] if isinstance(operand, fx.Node))
    first, second, third = (
        tuple(str(linear.target) for linear in feeding(program, operand)) for operand in (q, k, v)
    )
    _, heads, _, head_dim = shape(q)
    _, kv_heads, _, value_dim = shape(v)
    near = [name for names in (first, second, third) for name in names]
    return AttentionSite(
        node.name, common_parent(near) or node.name, heads, kv_heads, head_dim, value_dim,
        (first, second, third), node.meta["part"],
    )  # fmt: skip


def common_parent(names: list[str]) -> str:
    """The innermost module that holds all of them; empty when there are none."""
    parents = [name.split(".")[:-1] for name in names]
    if not parents:
        return ""
    shared = []
    for level in zip(*parents, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
