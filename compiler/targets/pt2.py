"""pt2: the model as a program of torch.export, beside the checkpoint that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...runtime.ops import npu_known
from ..errors import Refused
from .modelslim import ModelSlim
from .served import LinearSite, ModelFacts
from .target import Finding, Problem

if TYPE_CHECKING:
    from ..plan import Plan


@dataclass(frozen=True)
class Pt2(ModelSlim):
    """An ascendv1 directory with ``model.pt2``, and with ``model_npu.pt2`` where torch_npu's schemas are known."""

    name: ClassVar[str] = "pt2"
    summary: ClassVar[str] = "a torch.export program, beside the ascendv1 layout"

    def check(self, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[Problem, ...]:
        """What the layout has no type for, and where torch_npu is imported what its ops cannot compute."""
        found = list(super().check(sites, model))
        if not npu_known():
            return tuple(found)
        for site in sites:
            weight = site.scheme.weight
            grouped = weight is not None and weight.group and site.scheme.act is not None
            if grouped or (site.rotated and site.blocks > 1):
                what = "scales per group" if grouped else f"a rotation over {site.blocks} ranks"
                found.append(
                    Problem(
                        "npu",
                        site.name,
                        f"{site.scheme} with {what} has no op in torch_npu, which is imported",
                        "take another scheme, or compile without torch_npu, for the portable program alone",
                    )
                )
        return tuple(found)

    def problems(self, plan: Plan) -> tuple[str, ...]:
        """Also code that has no graph, and a model that no config describes."""
        found = list(super().problems(plan))
        if plan.program.stretches:
            first, count = next(iter(plan.program.stretches)), len(plan.program.stretches)
            found.append(
                f"{first}{f' and {count - 1} more' if count > 1 else ''}: its code has no graph that holds for every"
                " length, so there is no program of the model; take another --target"
            )
        if plan.program.config is None:
            found.append(
                "the model has no config of transformers, from which its program could be made; take another --target"
            )
        return tuple(found)

    def judge(
        self, directory: Path, *, tp: int = 1, deep: bool = True, trust_remote_code: bool = False
    ) -> tuple[Finding, ...] | None:
        """Whether tensors and description agree, and, with ``deep``, whether torch reads the program."""
        found = super().judge(directory, tp=tp, deep=deep, trust_remote_code=trust_remote_code) or ()
        if not deep:  # it is not written yet
            return found
        from ..program_file import PORTABLE, load_program

        try:
            load_program(directory)
        except Refused as error:
            return (*found, Finding("refuses", "P1", PORTABLE, str(error).partition(": ")[2]))
        return found

    def add(self, directory: Path) -> None:
        """The programs."""
        from ..program_file import save_programs

        save_programs(directory)


PT2 = Pt2()
