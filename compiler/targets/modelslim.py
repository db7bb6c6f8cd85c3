"""modelslim: whatever the ascendv1 layout can say, whether or not a server of today loads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...runtime.linear import IntegerLinear
from ..description import DESCRIPTION, description_of, own_block
from ..safetensors_io import TensorSpec
from ..scheme import LinearScheme
from . import ascendv1
from .ascendv1_files import consistent
from .served import LinearSite, ModelFacts
from .stored import stored
from .target import DiskNames, Finding, Layout, Problem, Target


@dataclass(frozen=True)
class ModelSlim(Target):
    """The layout without the rules of a server: also groups, and int4 weights with float activations."""

    name: ClassVar[str] = "modelslim"
    summary: ClassVar[str] = "ascendv1 layout, whatever it can say"

    def format_of(self, scheme: LinearScheme, rotated: bool) -> type[IntegerLinear] | None:
        """The format of the layout that holds a scheme."""
        return ascendv1.format_of(scheme, rotated)

    def check(self, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[Problem, ...]:
        """Schemes without a format, and groups that do not divide the width."""
        found: list[Problem] = []
        for site in sites:
            weight = site.scheme.weight
            if weight is None and not (site.rotated or site.beside or site.divided):
                continue
            if weight is not None and weight.group and site.in_features % weight.group:
                found.append(
                    Problem(
                        "group",
                        site.name,
                        f"groups of {weight.group} do not divide its {site.in_features} channels",
                        "take a group size that does, or exclude it",
                    )
                )
            if site.divided and (not site.scheme.quantized or site.rotated or site.online is not None):
                found.append(
                    Problem(
                        "division",
                        site.name,
                        "its input is divided online, which the layout has only for integer linears that no online"
                        " rotation precedes",
                        "leave the type non-fusion out, or exclude it from the smoothing",
                    )
                )
            found += branch_problems(site, self.format_of(site.scheme, site.rotated))
            if self.format_of(site.scheme, site.rotated) is None:
                rotated = " behind an online rotation" if site.rotated else ""
                shown = site.scheme if site.scheme.quantized else "a float linear"
                found.append(
                    Problem(
                        "type",
                        site.name,
                        f"the layout has no type for {shown}{rotated}",
                        "take another scheme"
                        + (f", or exclude it from {site.rotated_by}" if site.rotated else ""),
                    )
                )
        return tuple(found)

    def tp_sizes(self, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[int, ...]:
        """Only a rotation fixes the number of ranks; for the rest nobody says."""
        fixed = {site.blocks for site in sites if site.rotated and site.row_parallel}
        return tuple(sorted(fixed)) if len(fixed) == 1 else ()

    def layout(
        self,
        parameters: Mapping[str, TensorSpec],
        sites: Sequence[LinearSite],
        model: ModelFacts,
        names: DiskNames,
    ) -> Layout:
        """The tensors of the ascendv1 layout."""
        return ascendv1.layout(parameters, sites, model, names, self.format_of)

    def config(self, config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
        """With the place of the weights, for transformers."""
        return ascendv1.config(config)

    def files(self, layout: Layout) -> Mapping[str, Mapping[str, Any]]:
        """The description file."""
        return {ascendv1.DESCRIPTION: ascendv1.description(layout)}

    def judge(
        self, directory: Path, *, tp: int = 1, deep: bool = True, trust_remote_code: bool = False
    ) -> tuple[Finding, ...] | None:
        """Whether tensors and description agree; no one reader is meant."""
        return consistent(stored(directory), ascendv1.DESCRIPTION, lambda: _described(directory))


def _described(directory: Path) -> dict[str, Any] | None:
    """The description, but not one for MindIE alone, which other readers of the layout do not find."""
    known = (directory / DESCRIPTION).is_file() or own_block(directory) is not None
    return description_of(directory) if known else None


MODELSLIM = ModelSlim()


def branch_problems(site: LinearSite, format: type[IntegerLinear] | None) -> Iterator[Problem]:
    """Float parts stand beside integer linears that take their input as it is, and not beside others."""
    if site.beside is None:
        return
    if not site.scheme.quantized:
        why = f"it has {site.beside} and stays float, and the layout has those beside integers only"
    elif site.rotated or site.online is not None:
        why = f"it has {site.beside} and an online rotation, and the layout does not say which reads which"
    elif format is not None and format.packed:
        why = f"it has {site.beside}, and the layout has none beside {format.type}"
    else:
        return
    yield Problem("branch", site.name, why, f"exclude it from {site.beside_by}")
