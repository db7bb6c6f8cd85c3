"""Formats for the MLPs alone, and a target that wants to know how many linears stay float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import qc
from qc.compiler.targets.modelslim import ModelSlim
from qc.compiler.targets.served import LinearSite, ModelFacts
from qc.compiler.targets.target import Layout, Problem

MLP_W8A8 = qc.Scheme(
    "mlp-w8a8",
    (qc.Rule(include=("*.mlp.*",), scheme=qc.LinearScheme(qc.Int(8, "channel"), qc.Int(8, "token"))),),
)


@dataclass(frozen=True)
class Audited(ModelSlim):
    """The layout of modelslim, without integers of four bits, and with a file that counts the rest."""

    name: ClassVar[str] = "audited"
    summary: ClassVar[str] = "modelslim with an audit"

    def check(self, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[Problem, ...]:
        found = [
            Problem("bits", site.name, "four bits are not allowed here", "take w8a8")
            for site in sites
            if site.scheme.weight is not None and site.scheme.weight.bits == 4
        ]
        return (*super().check(sites, model), *found)

    def files(self, layout: Layout) -> Mapping[str, Mapping[str, Any]]:
        return {**super().files(layout), "audit.json": {"quantized": sorted(layout.prefixes)}}


AUDITED = Audited()
