"""Rotation of the values within each attention head."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.contract import EXACT, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.program import Program
from ..patterns.ov import ov_heads
from .rotate_residual import check_block_size, hadamard_of
from .smoothing import GRID, ONLINE_PASSES


@dataclass(frozen=True, kw_only=True)
class RotateHeads(Pass):
    """Rotate each value head, absorbed by the value and output projections.

    **Why.** The input of the output projection loses its outliers, at no cost when the model runs.

    **Before / after.** Rows of v become ``Rᵀ W_v`` per value head, columns of o ``W_o R`` per query head;
    under grouped-query attention the query heads of a group share their value head's matrix.

    **Source.** QuaRot (arXiv 2404.00456) section 4, stage 1b; R2 of SpinQuant (arXiv 2405.16406).
    """

    name = "rotate_heads"
    summary = "rotate values within each head, through the value and output projections"
    patterns = (ov_heads,)
    requires = frozenset()
    provides = frozenset({Fact.HEADS_ROTATED})
    breaks = frozenset()
    before = {
        ov_heads: {
            **dict.fromkeys(ONLINE_PASSES, "the input of o is rotated at run time from there on"),
            "dynamic_cache": GRID,
            "fa3_quant": GRID,
        }
    }
    after = {}
    claim = EXACT

    block_size: int = -1
    """Order of the diagonal blocks within a head: -1 for the whole head, else a power of 2 that divides."""

    def __post_init__(self) -> None:
        check_block_size(self.block_size)

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per attention."""
        rewrites, problems = [], []
        for match in ov_heads.find(program):
            value, problem = hadamard_of(match.head_dim, self.block_size, match.kv_heads, setting.seed)
            query, _ = hadamard_of(match.head_dim, self.block_size, match.heads, setting.seed)
            if value is None or query is None:
                problems.append(f"{match.v.module}: {problem}")
                continue
            edits = (Edit(Verb.ROTATE_OUT, match.v, value), Edit(Verb.ROTATE_IN, match.o, query))
            rewrites.append(Rewrite(self.name, "ov", match.o.module, edits, EXACT))
        notes: tuple[str, ...] = ()
        if not rewrites and not problems:
            miss = ov_heads.nearest(program)
            notes = (
                f"no site. {miss.at}: {miss.reason}"
                if miss is not None
                else "no site: no linear feeds an attention",
            )
        return Answer(tuple(rewrites), notes, tuple(problems))
