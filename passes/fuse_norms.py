"""Norm fusion: the gain of a norm moves into the linears that read it."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.contract import EXACT, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.flow import follow
from ..compiler.laws import Map, op_name
from ..compiler.operand import Gain, NormBias
from ..compiler.pattern import place
from ..compiler.program import Program
from ..patterns.norm_linear import NormLinear, norm_linear


@dataclass(frozen=True, kw_only=True)
class FuseNorms(Pass):
    """Fuse norm gains into the linears that read them.

    **Why.** A rotation of the residual stream passes through an RMS norm only when its gain is one.

    **Before / after.** ``W (g * n(x) + b) + c`` becomes ``(W diag(g)) n(x) + (c + W b)``, with g then one and b zero.
    Where a reader has no bias c, b stays in the norm as ``b / g``: no linear gets a bias that a server has no
    place for.

    **Source.** SliceGPT (arXiv 2401.15024) section 3.2, QuaRot (arXiv 2404.00456) section 4.
    """

    name = "fuse_norms"
    summary = "fuse norm gains into the linears that read them, so that rotations pass the norms"
    patterns = (norm_linear,)
    requires = frozenset()
    provides = frozenset({Fact.NORMS_FUSED})
    breaks = frozenset()
    before = {}
    after = {}
    claim = EXACT

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per norm that nothing but linears reads."""
        rewrites = tuple(
            Rewrite(self.name, "norm_linear", match.norm.module, edits(program, match), EXACT)
            for match in norm_linear.find(program)
        )
        if rewrites:
            return Answer(rewrites)
        miss = norm_linear.nearest(program)
        why = f"nearest, {miss.at}: {miss.reason}" if miss is not None else "no norm of this model has a gain"
        return Answer((), notes=(f"no site: {why}",))


def edits(program: Program, match: NormLinear) -> tuple[Edit, ...]:
    """The gain goes to the readers. So does a bias where all of them have one; else it stays, divided by the gain."""
    name, facts = match.norm.module, program.leaves[match.norm.module].norm
    assert facts is not None
    gain, bias = Gain(name, facts.offset), NormBias(name)
    found = [Edit(Verb.SCALE_IN, reader, gain) for reader in match.readers]
    if facts.bias and all("bias" in program.leaves[reader.module].parameters for reader in match.readers):
        found = [Edit(Verb.SHIFT_IN, reader, bias) for reader in match.readers] + found
        found.append(Edit(Verb.SHIFT_OUT, match.norm, bias))
    elif facts.bias:
        found.append(Edit(Verb.SCALE_OUT, match.norm, Gain(name, facts.offset, inverse=True)))
    return (*found, Edit(Verb.SET_UNIT, match.norm))


def reads_besides_linears(program: Program, norm: str) -> str:
    """The first thing that reads a norm and can not take over its gain."""
    node = next(node for node in program.graph.nodes if node.op == "call_module" and node.target == norm)
    obstacles = follow(program, node, Map.SCALE, copies_only=True).obstacles
    if not obstacles:
        return "no linear"
    return f"{op_name(obstacles[0].node)} in {place(program, obstacles[0].node)}"
