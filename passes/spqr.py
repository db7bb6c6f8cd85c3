"""SpQR: integers of linears column by column, and the single weights that are hardest to round in float."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..compiler.contract import Answer, Setting
from ..compiler.program import Program
from ..runtime.outlier_weights import OutlierWeights
from .gptq import Gptq
from .linear_quant import block_swaps
from .sites import width_in, width_out


@dataclass(frozen=True, kw_only=True)
class Spqr(Gptq):
    """GPTQ with a share of the weights in float, one by one, chosen by how much the others gain.

    **Why.** Few weights make the error of a group, by themselves or because the scale must reach them.

    **Before / after.** As ``gptq``, beside float activations; W is the integers' weight, zero where an outlier stands,
    plus a sparse float matrix.

    **Source.** SpQR (arXiv 2306.03078). Scales are not quantized once more, as they are there.
    """

    name = "spqr"
    summary = "as gptq, with the single weights that are hardest to round kept in float"
    weight_methods = ("spqr",)

    outliers: float = 0.01
    """Share of the weights of each linear that stay in float."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.outliers < 0.5:
            raise ValueError(f"outliers={self.outliers}: it must be above 0 and below 0.5")

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """As ``gptq``, for linears whose activation is float."""
        chosen, problems = self.chosen(program, setting)
        problems = list(problems)
        for name, swap in chosen.items():
            count = OutlierWeights.of_share(
                self.outliers, width_in(program, name) * width_out(program, name)
            ).count
            if swap.scheme.act is not None:
                problems.append(
                    f"{name}: single weights stand in float beside float activations only, and it is {swap.scheme}:"
                    " take a scheme such as w4a16-g64-asym"
                )
            elif not count:
                problems.append(f"{name}: outliers={self.outliers} of its weights are none: take more")
        chosen = {n: replace(s, scheme=replace(s.scheme, outliers=self.outliers)) for n, s in chosen.items()}
        return Answer(block_swaps(self.name, program, chosen), (), tuple(problems))
