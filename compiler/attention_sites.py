"""Attentions of a program as sites: which node, which module, how many heads, who writes q, k and v."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from .flow import feeding
from .laws import is_attention, shape
from .program import Program
from .scheme import matches

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


def grid_sites(
    program: Program, name: str, include: Iterable[str], exclude: Iterable[str], leaves: Iterable[str]
) -> tuple[tuple[AttentionSite, ...], tuple[str, ...]]:
    """The attentions in which a pass may place grids, and the problems.

    Those that have a grid of that kind already are left to the pass that placed it.

    Args:
        program: The program.
        name: The pass.
        include: Globs of attention modules.
        exclude: Globs of attention modules to leave alone.
        leaves: Names below an attention at which the pass places grids.
    """
    sites = attention_sites(program)
    if not sites:
        return (), (NONE,)
    modules = [site.module for site in sites]
    double = sorted(
        {m for m in modules if modules.count(m) > 1 and matches(m, include) and not matches(m, exclude)}
    )
    if double:
        return (), (
            f"{double[0]} holds more than one attention, and the layout has names for one: exclude it",
        )
    placed = {str(node.target).rpartition(".")[0] for node in program.graph.nodes if node.meta.get("stub")}
    chosen = [site for site in sites if matches(site.module, include) and not matches(site.module, exclude)]
    left = [site for site in chosen if not placed & {f"{site.module}.{leaf}" for leaf in leaves}]
    if chosen and not left:
        return (), (
            f"{name} has nothing to do: a pass before it has placed a grid wherever it would: leave one out",
        )
    return tuple(left), ()


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
