"""What the report says, as plain data: all of it from the plan, the journal and the manifest, none from the clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from ..calibration import Calibration
from ..certificate import LIMIT
from ..command_text import command_text
from ..cost import cost_of
from ..cost import size as size_text
from ..journal import Journal, quantized
from ..plan import Plan, Step
from ..plan_text import counts, sites, swapped
from ..program import Program
from .linears import linear_columns
from .states import states_of


def report_data(
    plan: Plan, journal: Journal, manifest: Mapping[str, Any], calibration: Calibration | None = None,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The data of a report page.

    Args:
        plan: What was compiled.
        journal: What happened.
        manifest: Versions, and digests of inputs and of the outputs written so far.
        calibration: What it was calibrated on, if it was.
        run: What varies between runs, as in ``run.json``; None leaves the section out.
    """
    entries = journal.entries
    return {
        "title": _title(plan),
        "summary": _summary(plan, journal),
        "steps": [_step(step, entries) for step in plan.steps],
        "limit": LIMIT,
        "twin": [entry["outcome"] for entry in entries if entry.get("part") == "twin"],
        **states_of(plan, entries),
        "layers": [part.name for part in plan.final.blocks],
        "linears": linear_columns(plan, entries),
        "stored": _stored(plan, entries),
        "losses": _losses(plan, entries),
        "certificates": _certificates(entries),
        "notes": _notes(plan, journal, calibration),
        "provenance": _provenance(plan, manifest, calibration),
        "run": None if run is None else dict(run),
    }


def _title(plan: Plan) -> str:
    names = getattr(plan.program.config, "architectures", None) or [type(plan.program.root).__name__]
    return str(names[0])


def parameters(program: Program) -> int:
    """How many numbers the checkpoint holds, tied ones once."""
    names = (name for name in program.source.names() if name not in program.ties)
    return sum(_product(program.source.shape(name)) for name in names)


def _product(shape: Sequence[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def _summary(plan: Plan, journal: Journal) -> dict[str, Any]:
    cost = cost_of(plan, peak=False)
    noise = sorted(
        (value, name)
        for entry in journal.entries
        for name, value in entry.get("sqnr_db", {}).items()
        if isfinite(value)
    )
    facts = {
        "blocks": str(len(plan.final.blocks)),
        "parameters": f"{parameters(plan.program):,}",
        **{
            key.replace("_", " ").removeprefix("num "): str(value)
            for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
            if (value := getattr(plan.program.config, key, None)) is not None
        },
        "floats": str(plan.dtype).removeprefix("torch."),
    }
    return {
        "facts": facts,
        "schemes": [[name, count, _bits(name)] for name, count in cost.schemes],
        "scheme": plan.scheme.name,
        "bits": round(cost.bits_per_weight, 2),
        "disk": size_text(cost.disk_bytes),
        "device": size_text(cost.device_bytes),
        "target": plan.target.name,
        "verdict": list(plan.problems),
        "warnings": len(plan.target.notes(plan)),
        "tp": list(cost.tp_sizes),
        "proofs": journal.proofs,
        "worst": journal.worst,
        "noise": [noise[0][0], noise[len(noise) // 2][0], noise[-1][0]] if noise else None,
        "loudest": [[name, value] for value, name in noise[:5]],
    }


def _bits(scheme: str) -> int:
    """Bits of the weight in the name of a format, 16 of a float one."""
    digits = scheme.removeprefix("W").partition("A")[0]
    return int(digits) if digits.isdecimal() else 16


def _step(step: Step, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rewrites = step.answer.rewrites
    found = counts(pattern.replace("_", "-") for rewrite in rewrites for pattern in sites(rewrite))
    own = [entry for entry in entries if entry.get("pass") == step.what.name]
    proofs = [entry["certificate"] for entry in own if "certificate" in entry]
    formats = swapped(step)
    return {
        "name": step.what.name,
        "spelled": str(step.what),
        "summary": step.what.summary,
        "claim": step.what.claim.name.lower(),
        "found": ", ".join(f"{count} {pattern}" for pattern, count in found.items()) or "no site",
        "rewrites": len({rewrite.where for rewrite in rewrites}),
        "proofs": len(proofs),
        "math": max((proof["math"] for proof in proofs), default=None),
        "stored": max((proof["stored"] for proof in proofs), default=None),
        "linears": sum(len(quantized(entry)) for entry in own),
        "formats": ", ".join(f"{count} {name}" for name, count in formats.items()),
        "notes": list(step.answer.notes),
    }


def _stored(plan: Plan, entries: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """By block, the error that the dtype of export adds to its exact rewrites."""
    found = {entry["part"]: entry["stored"] for entry in entries if "stored" in entry}
    return [found.get(part.name) for part in plan.final.blocks]


def _losses(plan: Plan, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By pass that trains, a curve per block: what the pass told, with what it measured."""
    numbers = {part.name: number for number, part in enumerate(plan.final.blocks)}
    found: dict[str, list[Any]] = {}
    for entry in entries:
        if "curves" in entry and entry["part"] in numbers:
            layers = found.setdefault(entry["pass"], [None] * len(numbers))
            layers[numbers[entry["part"]]] = {
                name: [[step, value if isfinite(value) else None] for step, value in curve]
                for name, curve in entry["curves"].items()
            }
    return [{"pass": name, "layers": layers} for name, layers in found.items()]


def _certificates(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By pass, its proofs in columns: part, site, the two errors."""
    found: dict[str, dict[str, list[Any]]] = {}
    for entry in entries:
        if "certificate" not in entry:
            continue
        own = found.setdefault(entry["pass"], {"part": [], "where": [], "math": [], "stored": []})
        own["part"].append(entry["part"])
        own["where"].append(entry["where"])
        own["math"].append(entry["certificate"]["math"])
        own["stored"].append(entry["certificate"]["stored"])
    return [{"pass": name, **columns} for name, columns in found.items()]


def _notes(plan: Plan, journal: Journal, calibration: Calibration | None) -> list[list[str]]:
    """What a reader should know, each with its kind: ``warning`` or ``note``."""
    told = [["warning", f"{plan.target.name}: {note}"] for note in plan.target.notes(plan)]
    if idle := journal.idle_experts:
        told.append(
            ["warning", f"{len(idle)} experts saw no calibration token, {idle[0]} first: give more --samples, or"
                        " --calibrate-all-experts"]
        )  # fmt: skip
    wanted = plan.run.samples if plan.run is not None else 0
    if calibration is not None and len(calibration.tokens) < wanted:
        told.append(["warning", f"calibrated on {len(calibration.tokens)} windows, {wanted} were asked for"])
    known = {note for _, note in told}
    target = set(plan.target.notes(plan))
    told += [["note", note] for note in plan.notes if note not in known and note not in target]
    told += [["note", note] for note in plan.program.notes if note not in plan.notes]
    return told


def _provenance(plan: Plan, manifest: Mapping[str, Any], calibration: Calibration | None) -> dict[str, Any]:
    run = plan.run
    facts = {"seed": str(plan.seed), "tensor parallel": str(plan.tp)}
    if calibration is not None and run is not None:
        files = ", ".join(file.rpartition("/")[2] for file in calibration.files)
        facts |= {
            "calibrated on": f"{len(calibration.tokens)} windows of {calibration.tokens.shape[1]} tokens",
            "calibration text": files or "the text that ships with qc",
            "calibration ran in": str(run.compute).removeprefix("torch."),
            "calibration tokens": f"sha256 {calibration.digest}",
        }
    return {
        "command": command_text(plan),
        "facts": facts,
        "versions": dict(manifest["versions"]),
        "remote_code": list(manifest["remote_code"]),
        "inputs": _files(manifest["inputs"]),
        "outputs": _files(manifest["outputs"]),
    }


def _files(digests: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    return [[name, digest["bytes"], digest["sha256"]] for name, digest in digests.items()]
