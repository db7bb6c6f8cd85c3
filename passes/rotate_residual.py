"""Rotation of the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..compiler.contract import EXACT, Answer, Basis, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.operand import Hadamard
from ..compiler.pattern import Site
from ..compiler.program import Program
from ..patterns.residual import residual, residual_centred
from ..runtime.hadamard import has_hadamard
from .fuse_norms import reads_besides_linears
from .sites import width_in

WITHOUT = "Leave quarot (rotate_residual) out for this model; smoothing, quantizers and online_rotation do without it"


@dataclass(frozen=True, kw_only=True)
class RotateResidual(Pass):
    """Rotate the hidden state by a random Hadamard matrix, absorbed by all that write and read it.

    **Why.** Outlier channels of the hidden state are spread over all channels, so that few bits suffice.

    **Before / after.** Writers W become ``Qᵀ W``, readers ``W Q``, the embedding ``E Q``. Norms with unit gain
    do not notice; where one subtracts the mean (LayerNorm), the matrix is one that keeps the all-ones vector. A bias
    of a norm with unit gain rotates along.

    **Source.** QuaRot (arXiv 2404.00456) section 4, stage 1a; random signs as in QuIP# (arXiv 2402.04396).
    """

    name = "rotate_residual"
    summary = "rotate the residual stream by a random Hadamard matrix, so that outlier channels are spread"
    patterns = (residual, residual_centred)
    requires = frozenset({Fact.NORMS_FUSED})
    provides = frozenset({Fact.RESIDUAL_ROTATED})
    breaks = frozenset()
    before = {}
    after = {}
    claim = EXACT

    block_size: int = -1
    """Order of the diagonal blocks: -1 for one matrix over all channels, else a power of 2 that divides."""

    export_extra_info: bool = True
    """Write the rotation to ``optional/quarot.safetensors``, for draft models that share the hidden state."""

    def __post_init__(self) -> None:
        check_block_size(self.block_size)

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite over the whole model, split into its parts when it is solved."""
        plain = residual.find(program)
        matches = plain or residual_centred.find(program)
        if not matches:
            return Answer(
                (), problems=(f"the residual stream can not be rotated: {why_not(program)}. {WITHOUT}",)
            )
        space = matches[0].space
        width = width_in(program, str(space.readers[0].target))
        rotation, problem = hadamard_of(width, self.block_size, 1, setting.seed)
        if rotation is None:
            return Answer((), problems=(f"the residual stream: {problem}",))
        rotation = self.rotation(replace(rotation, keeps_ones=not plain), program)
        writers = [Edit(Verb.ROTATE_OUT, Site(str(node.target)), rotation) for node in space.writers]
        readers = [Edit(Verb.ROTATE_IN, Site(str(node.target)), rotation) for node in space.readers]
        basis = Basis(rotation, frozenset(node.name for node in space.values))
        rewrite = Rewrite(self.name, "residual", "residual stream", (*writers, *readers), EXACT, basis)
        note = f"{len(writers)} writers, {len(readers)} readers, {rotation}"
        return Answer((rewrite,), notes=(note,))

    def rotation(self, rotation: Hadamard, program: Program) -> Hadamard:
        """The matrix, given the one that its sizes ask for."""
        return rotation


def why_not(program: Program) -> str:
    """What keeps the residual stream from being rotated, with its place."""
    miss = residual_centred.nearest(program)
    if miss is None:
        return "the model has no embedding"
    leaf = program.leaves.get(miss.at)
    if leaf is not None and leaf.norm is not None and leaf.norm.weight and not leaf.norm.mean_subtracting:
        other = reads_besides_linears(program, miss.at)
        return f"{miss.at} multiplies by its gain, which only linears could take over, and {other} reads it"
    return miss.reason if miss.reason.startswith(miss.at) else f"{miss.at}: {miss.reason}"


def check_block_size(block_size: int) -> None:
    """Refuse a block size that is neither -1 nor a positive power of two."""
    if block_size != -1 and (block_size < 2 or block_size & (block_size - 1)):
        raise ValueError(f"block_size={block_size}: it must be -1 or a power of 2")


def hadamard_of(width: int, block_size: int, copies: int, seed: int) -> tuple[Hadamard | None, str]:
    """``copies`` rotations of ``width`` channels, or None and the reason why there is none."""
    order = width if block_size == -1 else block_size
    if width % order:
        return None, f"block_size={order} does not divide its width {width}"
    if not has_hadamard(order):
        return None, (
            f"no Hadamard matrix of order {order} is known here (orders are 1, 2 and multiples of 4): "
            f"choose a block_size, a power of 2 that divides {width}"
        )
    return Hadamard(order, seed, copies * (width // order)), ""
