"""Named plans: passes with formats and target under one name, and what they reached where they were measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import registry


@dataclass(frozen=True)
class Named:
    """One plan that ``--passes NAME`` stands for."""

    summary: str
    """One line: for whom."""
    passes: str
    scheme: str
    target: str
    row: str
    """The row of ``python -m benchmarks.accuracy`` that measures it."""
    multiple: float
    """Perplexity as a multiple of the float model's, there."""
    kl: float
    """Mean divergence per token from the float model, nats, there."""


def named(passes: Any) -> Named | None:
    """The plan that a whole ``--passes`` names; None for everything else."""
    name = passes.strip() if isinstance(passes, str) else ""
    return registry.get("recipes", name) if name in registry.names("recipes") else None


def recipes_text(name: str | None = None) -> str:
    """What ``qc recipes`` prints: every named plan, or one of them. Refused for a name that there is not."""
    wanted = registry.names("recipes") if name is None else {name: None}
    found = {one: registry.get("recipes", one) for one in wanted}
    lines: list[str] = []
    for one, plan in found.items():
        lines += [
            f"{one}: {plan.summary}",
            f"    --passes {plan.passes} --scheme {plan.scheme} --target {plan.target}",
            f"    SmolLM2-135M: {plan.multiple:.3f} times the float perplexity, divergence {plan.kl:.3g} nats"
            f" (python -m benchmarks.accuracy {plan.row})",
        ]
    return "\n".join(lines)
