"""The plan as a person reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from .choice_text import choice_json
from .contract import Rewrite
from .cost import Cost, cost_of
from .edit import Edit, Verb
from .laws import is_attention
from .operand import Quantize, Stub
from .plan import Plan, Step


def plan_text(plan: Plan, *, cost: Cost | None = None, calibration: str | None = None) -> str:
    """The ordered passes with what each found, the costs, notes and problems.

    Nothing in it varies between runs but the estimate of peak memory, which a ``cost`` without it leaves out.
    """
    cost = cost or cost_of(plan)
    lines = [f"plan for {plan.program.title}", ""]
    for step in plan.steps:
        lines += step_lines(step)
    lines.append("")
    lines += [f"{label + ':':22}{value}" for label, value in cost.rows()]
    if plan.run is not None and plan.needs_data:
        lines.append(f"{'calibration:':22}{plan.run}")
    lines.append(
        f"{'target:':22}{plan.target.spelling}, scheme {plan.scheme.name}, tp {plan.tp}, seed {plan.seed}"
    )
    if calibration is not None:
        lines.append(f"{'calibration tokens:':22}sha256 {calibration}")
    lines += [f"note: {note}" for note in plan.notes]
    if plan.problems:
        lines += ["", f"problems ({len(plan.problems)}):"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(plan.problems, 1)]
    return "\n".join(lines) + "\n"


def step_lines(step: Step) -> list[str]:
    """One pass: its number, its name and options, what it found, its notes."""
    found = counts(pattern for rewrite in step.answer.rewrites for pattern in sites(rewrite))
    shown = ", ".join(f"{count} {pattern.replace('_', '-')}" for pattern, count in found.items()) or "no site"
    head, claim = f"{step.index + 1:3}. {step.what!s}", step.what.claim.name.lower()
    lines = [f"{head:47} {shown:32} {claim}"] if len(head) < 48 else [head, f"{'':47} {shown:32} {claim}"]
    online = inserted(step)
    if online:
        kinds = sorted({str(edit.operand) for edit in online})
        lines.append(f"     inserts {len(online)} online rotations: {', '.join(kinds)}")
    schemes = swapped(step)
    if schemes:
        lines.append("     " + ", ".join(f"{count} linears {name}" for name, count in schemes.items()))
    return lines + [f"     {note}" for note in step.answer.notes]


def sites(rewrite: Rewrite) -> list[str]:
    """The pattern of a rewrite, once per site: a quantizer that takes a block at once takes many linears."""
    swaps = sum(edit.verb is Verb.SWAP for edit in rewrite.edits)
    return [rewrite.pattern] * max(1, swaps)


def counts(names: Iterable[str]) -> dict[str, int]:
    """How often each occurs, in order of first occurrence."""
    return dict(Counter(names))


def inserted(step: Step) -> list[Edit]:
    """The edits of a pass that put an op into the graph which runs with the model."""
    return [edit for rewrite in step.answer.rewrites for edit in rewrite.edits if edit.verb is Verb.WRAP]


def swapped(step: Step) -> dict[str, int]:
    """Scheme to the number of linears to which a pass gives it."""
    operands = (edit.operand for rewrite in step.answer.rewrites for edit in rewrite.edits)
    return counts(str(operand.scheme) for operand in operands if isinstance(operand, Quantize))


def layers(step: Step) -> dict[str, dict[str, int]]:
    """Part of the model to pattern to the number of sites there; a site in several parts counts in each."""
    names = {part.index: part.name for part in step.program.parts}
    place = {str(n.target): n.meta["part"] for n in step.program.graph.nodes if n.op == "call_module"}
    place |= {n.name: n.meta["part"] for n in step.program.graph.nodes if is_attention(n)}
    found: dict[int, list[str]] = {}
    for rewrite in step.answer.rewrites:
        places = [
            place[e.operand.node if isinstance(e.operand, Stub) else e.site.module] for e in rewrite.edits
        ]
        for index in dict.fromkeys(places):
            found.setdefault(index, []).append(rewrite.pattern)
    return {names[index]: counts(found[index]) for index in sorted(found)}


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan for machines: everything that the text says, and every site and edit.

    Per pass ``found`` counts sites by pattern, ``layers`` counts them per part of the model, ``online`` lists the ops
    that will run with the model before a linear, ``schemes`` counts quantized linears. Of ``cost``, ``peak_bytes`` and
    ``calibration`` are null where nobody said how calibration runs. ``problems`` is empty when the plan can be done.
    """
    run = plan.run
    return {
        "model": plan.program.title,
        "blocks": len(plan.program.blocks),
        "passes": [
            {
                "name": step.what.name,
                "options": {k: list(v) if isinstance(v, tuple) else v for k, v in step.what.options().items()},
                "claim": step.what.claim.name,
                "found": counts(rewrite.pattern for rewrite in step.answer.rewrites),
                "layers": layers(step),
                "online": [{"before": e.site.module, "op": str(e.operand)} for e in inserted(step)],
                "schemes": swapped(step),
                "sites": [{"pattern": r.pattern, "where": r.where, "edits": [str(e) for e in r.edits]}
                          for r in step.answer.rewrites],
                "notes": list(step.answer.notes),
            }
            for step in plan.steps
        ],
        "cost": cost_of(plan).numbers(),
        "choice": None if plan.choice is None else choice_json(plan.choice),
        "calibration": None if run is None else {
            "needed": plan.needs_data, "samples": run.samples, "length": run.length, "files": list(run.calib),
            "compute_dtype": str(run.compute).removeprefix("torch."), "microbatch_tokens": run.microbatch,
        },
        "target": plan.target.spelling,
        "scheme": plan.scheme.name,
        "tp": plan.tp,
        "seed": plan.seed,
        "export_dtype": str(plan.dtype).removeprefix("torch."),
        "notes": list(plan.notes),
        "problems": list(plan.problems),
    }  # fmt: skip
