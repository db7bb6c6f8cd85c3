"""The plan as a person reads it."""

from __future__ import annotations

from typing import Any

from .cost import Cost, cost_of
from .plan import Plan, Step


def plan_text(plan: Plan, *, cost: Cost | None = None, calibration: str | None = None) -> str:
    """The ordered passes with what each found, the costs, notes and problems. Nothing in it varies between runs."""
    cost = cost or cost_of(plan)
    lines = [f"plan for {title(plan)}", ""]
    for step in plan.steps:
        lines += step_lines(step)
    lines.append("")
    lines += [f"{label + ':':22}{value}" for label, value in cost.rows()]
    lines.append(
        f"{'target:':22}{plan.target.name}, scheme {plan.scheme.name}, tp {plan.tp}, seed {plan.seed}"
    )
    if calibration is not None:
        lines.append(f"{'calibration tokens:':22}sha256 {calibration}")
    lines += [f"note: {note}" for note in plan.notes]
    if plan.problems:
        lines += ["", f"problems ({len(plan.problems)}):"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(plan.problems, 1)]
    return "\n".join(lines) + "\n"


def title(plan: Plan) -> str:
    """What is compiled: architecture, number of blocks and linears."""
    program = plan.program
    architectures = getattr(program.config, "architectures", None) or [type(program.root).__name__]
    return f"{architectures[0]}, {len(program.blocks)} blocks"


def step_lines(step: Step) -> list[str]:
    """One pass: its number, its name and options, what it found, its notes."""
    found: dict[str, int] = {}
    for rewrite in step.answer.rewrites:
        found[rewrite.pattern] = found.get(rewrite.pattern, 0) + 1
    shown = ", ".join(f"{count} {pattern.replace('_', '-')}" for pattern, count in found.items()) or "no site"
    lines = [f"{step.index + 1:3}. {step.what!s:42} {shown:32} {step.what.claim.name.lower()}"]
    inserted = [
        edit for rewrite in step.answer.rewrites for edit in rewrite.edits if edit.verb.name == "WRAP"
    ]
    if inserted:
        kinds = sorted({str(edit.operand) for edit in inserted})
        lines.append(f"     inserts {len(inserted)} online rotations: {', '.join(kinds)}")
    schemes: dict[str, int] = {}
    for rewrite in step.answer.rewrites:
        for edit in rewrite.edits:
            if edit.verb.name == "SWAP":
                name = str(edit.operand.scheme)  # type: ignore[union-attr]
                schemes[name] = schemes.get(name, 0) + 1
    if schemes:
        lines.append("     " + ", ".join(f"{count} linears {name}" for name, count in schemes.items()))
    return lines + [f"     {note}" for note in step.answer.notes]


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan for machines."""
    cost = cost_of(plan)
    return {
        "model": title(plan),
        "passes": [
            {
                "name": step.what.name,
                "options": {k: list(v) if isinstance(v, tuple) else v for k, v in step.what.options().items()},
                "claim": step.what.claim.name,
                "sites": [{"pattern": r.pattern, "where": r.where, "edits": [str(e) for e in r.edits]}
                          for r in step.answer.rewrites],
                "notes": list(step.answer.notes),
            }
            for step in plan.steps
        ],
        "cost": cost.numbers(),
        "target": plan.target.name,
        "scheme": plan.scheme.name,
        "tp": plan.tp,
        "notes": list(plan.notes),
        "problems": list(plan.problems),
    }  # fmt: skip
