"""A failed proof as one file: the tensors and rows that it ran on, so that this rewrite alone is proved again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .capture import capture
from .certificate import Edited, error, outcome
from .contract import Pass, Rewrite
from .errors import Failed, Refused
from .part_work import restricted
from .plan import OF_THE_PASSES, Plan, make_plan
from .proof import Evidence, neutral
from .scheme import Rule, Scheme
from .scheme_names import scheme_named

PREFIX = "failed-proof-"


def write(out: Path, plan: Plan, found: Evidence) -> Path:
    """Write the file beside an output that was not made; its size is that of one part in float32."""
    named: dict[str, Tensor] = {f"weight/{name}": tensor for name, tensor in found.tensors.items()}
    named |= {f"value/{slot.name}": value for slot, value in found.values.items()}
    named |= {f"row/{name}": value for name, value in found.rows.items() if isinstance(value, Tensor)}
    said = {
        "model": plan.program.path, "passes": ",".join(str(step.what) for step in plan.steps),
        **_said(plan.scheme), "target": plan.target.spelling, "tp": plan.tp, "seed": plan.seed,
        "part": found.part.index, "step": found.step.index, "where": found.rewrite.where, "math": found.math,
        "numbers": {name: value for name, value in found.rows.items() if isinstance(value, int)},
    }  # fmt: skip
    file = out.with_name(f"{PREFIX}{out.name}.safetensors")
    save_file(
        {name: t.detach().clone().contiguous() for name, t in named.items()}, file, {"qc": json.dumps(said)}
    )
    return file


@dataclass(frozen=True)
class Again:
    """A proof that was run again: the rewrite, and by how much it changes the function (relative, float64)."""

    where: str
    edits: tuple[str, ...]
    math: float
    then: float
    """What it was when the compile stopped."""

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.where}: changes the function by {self.math:.2g} (it was {self.then:.2g})",
             *(f"  {edit}" for edit in self.edits)]
        )  # fmt: skip


def reproduce(
    file: str | Path, *, model: Any = None, passes: str | Iterable[str | Pass] | None = None,
    trust_remote_code: bool = False,
) -> Again:  # fmt: skip
    """Prove the rewrite of a file again, by the passes as they are now.

    Args:
        file: What a compile with a failed proof wrote.
        model: In place of the path that the file names, such as a module in memory.
        passes: In place of those that the file names; needed where one of them has no registered name.
        trust_remote_code: Whether Python code that comes with the checkpoint may run.

    Raises:
        Refused: The file is none of these, or the plan no longer has this rewrite, or not with these unknowns.
    """
    said, tensors = _read(Path(file))
    if model is None and said["model"] is None:
        raise Refused(f"{file}: the model was in memory: give it, reproduce(file, model=...)")
    program = capture(
        said["model"] if model is None else model, certify=False, trust_remote_code=trust_remote_code
    )
    plan = make_plan(
        program, said["passes"] if passes is None else passes, scheme=_scheme(said), target=said["target"],
        tp=said["tp"], seed=said["seed"],
    )  # fmt: skip
    if said["part"] >= len(plan.program.parts):
        raise Refused(f"{file}: the model has no part {said['part']}: it is not the one that was compiled")
    part = plan.program.parts[said["part"]]
    rewrite, step = _of(plan, said, part, str(file))
    following = plan.steps[step.index + 1] if step.index + 1 < len(plan.steps) else None
    after = (following.program, following.bases) if following else (plan.final, plan.bases)
    rows = {**{n[4:]: t for n, t in tensors.items() if n.startswith("row/")}, **said["numbers"]}
    base = {**neutral(after[0], part), **{n[7:]: t for n, t in tensors.items() if n.startswith("weight/")}}
    for slot in rewrite.slots:
        if f"value/{slot.name}" not in tensors:
            raise Refused(
                f"{file}: the pass now solves {slot.name}, of which the file has no value: compile again, or give the"
                " unknowns the names that they had"
            )
    values = {slot: tensors[f"value/{slot.name}"] for slot in rewrite.slots}
    before = outcome(step.program, part, base, rows, step.bases)
    edited = Edited(after[0], base, rewrite.edits, values, torch.float64)
    math = error(before, outcome(after[0], part, edited, rows, after[1]), rows)
    return Again(
        f"{rewrite.pass_name} at {rewrite.where} ({part.name})",
        tuple(map(str, rewrite.edits)),
        math,
        said["math"],
    )


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says of its proof, and the tensors that it ran on."""
    none = f"{file}: this is no file of a failed proof"
    if not file.is_file():
        raise Refused(f"{none} ({'a directory' if file.is_dir() else 'no such file'})")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            if "qc" not in metadata:
                raise Refused(f"{none}: it holds tensors, and nothing that qc says of them")
            said = json.loads(metadata["qc"])
            return said, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error_:
        raise Refused(f"{none} ({error_})") from None


def _said(scheme: Scheme) -> dict[str, Any]:
    """A scheme as it stands in the file: its name, and its rules where no scheme of that name is registered."""
    if scheme == OF_THE_PASSES:
        return {"scheme": None}
    try:
        known = scheme_named(scheme.name) == scheme
    except Refused:
        known = False
    return {"scheme": scheme.name} | ({} if known else {"rules": [_rule(rule) for rule in scheme.rules]})


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "include": rule.include,
        "exclude": rule.exclude,
        "role": rule.role,
        "scheme": rule.scheme.spelling,
    }


def _scheme(said: Mapping[str, Any]) -> str | Scheme | None:
    if "rules" not in said:
        return said["scheme"]
    rules = (
        Rule(
            include=tuple(rule["include"]), exclude=tuple(rule["exclude"]), role=rule["role"],
            scheme=scheme_named(rule["scheme"]).rules[0].scheme,
        )
        for rule in said["rules"]
    )  # fmt: skip
    return Scheme(said["scheme"], tuple(rules))


def _of(plan: Plan, said: Mapping[str, Any], part: Any, file: str) -> tuple[Rewrite, Any]:
    if said["step"] < len(plan.steps):
        step = plan.steps[said["step"]]
        for rewrite in restricted(step, plan.program, part):
            if rewrite.where == said["where"]:
                return rewrite, step
    raise Refused(f"{file}: step {said['step'] + 1} of the plan no longer rewrites {said['where']}")


def kept(failed: Failed, plan: Plan, out: Path) -> Failed:
    """The error of a failed proof, which now names the file that was written of it; any other error as it is."""
    found = getattr(failed, "evidence", None)
    if found is None:
        return failed
    try:
        file = write(out, plan, found)
    except (OSError, SafetensorError) as error_:  # a full disk must not hide what failed
        return type(failed)(f"{failed}. What it ran on could not be kept beside {out}: {error_}")
    return type(failed)(f"{failed}. qc reproduce {file} proves this rewrite alone again")
