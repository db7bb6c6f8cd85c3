"""Plan: an ordered list of passes and a target, checked and costed before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from . import registry
from .contract import EXACT, LOSSY, Answer, Basis, Fact, Pass, Setting
from .device import CPU
from .errors import Refused
from .experts import ROUTED
from .globs import unused_globs, unused_rules
from .graph_edit import rewritten
from .laws import is_attention
from .program import Program
from .roles import mixtures, roles_of
from .scheme import Scheme
from .scheme_names import scheme_named
from .sharing import consistent
from .spelling import passes_of
from .targets.spelled import target_named

if TYPE_CHECKING:
    from .choose import Choice
    from .memory import Run

OF_THE_PASSES = Scheme("strategies")
"""Stands where every quantizing pass has formats of its own."""


@dataclass(frozen=True)
class Step:
    """One pass of the plan: what it found, and the state of the program before it."""

    index: int
    what: Pass
    answer: Answer
    program: Program
    bases: tuple[Basis, ...]
    """Rotations of the residual stream that earlier passes made, in order."""


@dataclass(frozen=True)
class Plan:
    """What a compile will do. ``problems`` is empty when it can be done."""

    program: Program
    steps: tuple[Step, ...]
    final: Program
    """The program after all passes: graph side applied, weights untouched."""
    bases: tuple[Basis, ...]
    scheme: Scheme
    target: Any
    dtype: torch.dtype
    """The dtype in which floats are exported."""
    tp: int
    seed: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    run: Run | None = None
    """How calibration runs, where somebody said so: peak memory depends on it."""
    choice: Choice | None = None
    """How its formats were chosen, where they were."""

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        return CPU if self.run is None else self.run.device

    @property
    def needs_data(self) -> bool:
        """Whether any unknown is solved on calibration data."""
        return any(
            step.what.needs_training
            or any(slot.needs for rewrite in step.answer.rewrites for slot in rewrite.slots)
            or any(step.what.surveys(rewrite) for rewrite in step.answer.rewrites)
            for step in self.steps
        )

    @property
    def runs_float(self) -> bool:
        """Whether calibration runs blocks without integers: for what is observed there, or what is to be met."""
        if not self.needs_data or not any(step.what.propagates_quantized for step in self.steps):
            return self.needs_data
        return bool(mixtures(self.program)) or any(
            step.what.needs_target
            or (step.what.needs_training and not step.what.propagates_quantized)
            or any(slot.needs for rewrite in step.answer.rewrites for slot in rewrite.slots)
            for step in self.steps
        )

    @property
    def rewrites(self) -> dict[str, int]:
        """How many places of the model each pass rewrites, by the name of the pass."""
        places: dict[str, set[str]] = {}
        for step in self.steps:
            for rewrite in step.answer.rewrites:
                places.setdefault(rewrite.pass_name, set()).add(rewrite.where)
        return {name: len(found) for name, found in places.items()}

    @cached_property
    def layout(self) -> Any:
        """Every tensor of the export."""
        return self.target.layout_of(self)

    @cached_property
    def formats(self) -> dict[str, Any]:
        """The format class of every quantized linear, by module."""
        return {
            str(node.target): self.target.format_of(node.meta["scheme"], served_rotation(node))
            for node in self.final.graph.nodes
            if "scheme" in node.meta
        }

    def __str__(self) -> str:
        from .plan_text import plan_text

        return plan_text(self)

    def require(self) -> Plan:
        """The plan itself, or Refused with all its problems at once."""
        if self.problems:
            count = len(self.problems)
            lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1))
            raise Refused(f"this plan has {count} problem{'s' if count > 1 else ''}:\n{lines}")
        return self


def served_rotation(node: Any) -> bool:
    """Whether a linear is rotated online in the way that has a format of its own."""
    rotation = node.meta.get("rotated")
    return rotation is not None and rotation.layout == "flatquant"


def make_plan(
    program: Program,
    passes: str | Iterable[str | Pass],
    *,
    scheme: str | Scheme | None = None,
    target: str | Any = "vllm-ascend",
    tp: int = 1,
    seed: int = 0,
    run: Run | None = None,
    calibrate_all_experts: bool = False,
) -> Plan:
    """Run the rewrite phase: order checks, matches, edits of the graph, the target's rules. No weight is read.

    ``scheme`` None is ``auto``, or nothing where every quantizing pass has formats of its own.
    ``calibrate_all_experts`` lets every expert see every calibration token; the function stays as it is.
    """
    program = all_rows(program) if calibrate_all_experts else program
    chosen, notes = passes_of(passes)
    unread = unread_scheme(chosen, scheme)
    scheme = scheme_of(chosen, scheme)
    target = target_named(target)
    dtype = torch.bfloat16 if program.dtype in (torch.float32, torch.float64) else program.dtype
    roles = roles_of(program)
    problems = [*unread, *order_problems(chosen)]
    if calibrate_all_experts and not mixtures(program):
        problems.append("--calibrate-all-experts: the model has no experts; leave it out")
    steps: list[Step] = []
    current, bases = program, ()
    facts: set[Fact] = set()
    for index, one in enumerate(chosen):
        setting = setting_at(chosen, index, scheme=scheme, roles=roles, tp=tp, seed=seed, dtype=dtype)
        lacking = one.requires - facts
        if lacking:
            problems += [missing_fact(one, fact) for fact in sorted(lacking, key=lambda fact: fact.name)]
            answer = Answer(())
        else:
            answer = consistent(current, one, one.rewrite(current, setting))
        problems += [f"{one.name}: {problem}" for problem in answer.problems]
        problems += unused_globs(one, current, setting)
        problems += after_quantizer(one, answer, current)
        problems += nothing_left(one, answer, current)
        steps.append(Step(index, one, answer, current, bases))
        current = rewritten(current, answer.rewrites)
        bases += tuple(rewrite.basis for rewrite in answer.rewrites if rewrite.basis is not None)
        facts = (facts - one.breaks) | one.provides
    problems = folded(problems + unused_rules(scheme, program) + stored_together(current))
    problems = problems or nothing_matches(steps)
    notes += remarks(program, scheme, roles)
    plan = Plan(
        program, tuple(steps), current, bases, scheme, target, dtype, tp, seed, tuple(problems), notes
    )
    if not any(rewrite.claim is LOSSY for step in steps for rewrite in step.answer.rewrites) and not problems:
        notes += ("no linear is quantized: add linear_quant or autoround, or choose another --scheme",)
    return Plan(
        program, tuple(steps), current, bases, scheme, target, dtype, tp, seed,
        (*problems, *target.problems(plan)), (*notes, *target.notes(plan)), run,
    )  # fmt: skip


def all_rows(program: Program) -> Program:
    """The program with all rows sent to all experts; what is routed elsewhere still does not count."""
    fork = program.fork()
    for node in fork.graph.nodes:
        if node.target is ROUTED:
            node.args = (*node.args[:3], True)
    return fork


def all_have_formats(chosen: Iterable[Pass]) -> bool:
    """Whether there are quantizing passes and each has ``strategies``, so that none reads the plan's scheme."""
    quantizers = [one for one in chosen if Fact.QUANTIZED in one.provides]
    return bool(quantizers) and all(one.options().get("strategies") for one in quantizers)


def scheme_of(chosen: Iterable[Pass], given: str | Scheme | None) -> Scheme:
    """The scheme of a plan: a registered name or a scheme, or what stands for none."""
    if given is None:
        return OF_THE_PASSES if all_have_formats(chosen) else registry.get("schemes", "auto")
    return scheme_named(given) if isinstance(given, str) else given


def unread_scheme(chosen: Iterable[Pass], scheme: str | Scheme | None) -> list[str]:
    """A scheme that was asked for and that no pass reads."""
    if scheme is None or not all_have_formats(chosen):
        return []
    name = scheme if isinstance(scheme, str) else scheme.name
    return [
        f"scheme {name} is read by no pass: every quantizing pass has formats of its own; leave out one of them"
    ]


def remarks(program: Program, scheme: Scheme, roles: Mapping[str, frozenset[str]]) -> tuple[str, ...]:
    """What a scheme does to this model that its name does not say."""
    found = []
    if any(rule.role == "gated" for rule in scheme.rules) and not roles["gated"]:
        others = dict.fromkeys(str(rule.scheme) for rule in scheme.rules if rule.role is None)
        found.append(
            f"scheme {scheme.name}: the model has no gated product, so every block linear is "
            + ", ".join(others)
        )
    blocks = {part.index for part in program.blocks}
    if scheme.rules and mixtures(program):
        found.append(
            f"{len(mixtures(program))} layers hold experts, {len(mixtures(program)[0])} in the first of them; what"
            " sends rows to them stays float"
        )
    boxes = [
        str(node.target)
        for node in program.graph.nodes
        if node.meta.get("part") in blocks
        and node.op == "get_attr"
        and node.target not in program.constants
        and node.meta["val"].dim() > 1
    ]
    if scheme.rules and boxes:
        found.append(f"{len(boxes)} matrices that no linear holds stay float: {boxes[0]} is the first")
    return tuple(found)


def stored_together(final: Program) -> list[str]:
    """Linears that the checkpoint stores in one tensor and of which a plan quantizes some."""
    groups: tuple[tuple[str, ...], ...] = getattr(final.source, "together", ())
    quantized = {str(node.target) for node in final.graph.nodes if "scheme" in node.meta}
    problems = []
    for group in groups:
        left = [name for name in group if name not in quantized]
        if left and len(left) < len(group):
            problems.append(
                f"experts: {left[0]}: it stays float beside others that are quantized, and the checkpoint stores"
                " all of them in one tensor: quantize all experts of a layer, or none"
            )
    return problems


def folded(problems: Iterable[str]) -> list[str]:
    """Problems that differ in their site alone, told once: ``pass: site and 3 more alike: why``."""
    alike: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        name, _, rest = problem.partition(": ")
        site, _, why = rest.partition(": ")
        alike.setdefault((name, why or rest), []).append(site if why else "")
    return [
        f"{name}: " + (f"{first}{f' and {len(more)} more alike' if more else ''}: {why}" if first else why)
        for (name, why), (first, *more) in alike.items()
    ]


def setting_at(chosen: Sequence[Pass], index: int, *, roles: Any, **rest: Any) -> Setting:
    """What the pass at one place of a plan may know."""
    names = tuple(one.name for one in chosen)
    return Setting(
        before=names[:index],
        after=names[index + 1 :],
        roles=roles,
        row_parallel=roles["row_parallel"],
        **rest,
    )


def order_problems(chosen: Sequence[Pass]) -> list[str]:
    """Passes that stand where another one's declaration forbids it, each with the reason and the fix."""
    names = [one.name for one in chosen]
    problems = []
    neutral = {"scheme": None, "roles": {"row_parallel": frozenset()}}
    for index, one in enumerate(chosen):
        taken = one.takes(setting_at(chosen, index, **neutral))
        for pattern in taken:
            shown = pattern.name.replace("_", "-")
            typed = hasattr(one, "enable_subgraph_type")
            leave = f", or leave {shown} out (enable_subgraph_type=...)" if typed else ""
            for other, why in one.before.get(pattern, {}).items():
                if other in names[:index]:
                    problems.append(
                        f"{one.name} takes {shown} sites after {other}: {why}. Put it before {other}{leave}"
                    )
            for other, why in one.after.get(pattern, {}).items():
                if other in names[index + 1 :]:
                    problems.append(
                        f"{one.name} takes {shown} sites before {other}: {why}. Put it after {other}{leave}"
                    )
    return problems


def missing_fact(one: Pass, fact: Fact) -> str:
    """What a pass requires and nobody before it provides."""
    providers = [name for name, cls in registry.each("passes") if fact in cls.provides and cls.name == name]
    fix = f"put {' or '.join(providers)} before it" if providers else "no registered pass provides it"
    return f"{one.name} requires that {fact.value}, which no pass before it provides: {fix}"


def after_quantizer(one: Pass, answer: Answer, current: Program) -> list[str]:
    """Rewrites of weights that are integers already."""
    quantized = {str(node.target) for node in current.graph.nodes if "scheme" in node.meta}
    if one.claim is not EXACT:
        return []
    hit = [module for rewrite in answer.rewrites for module in rewrite.modules if module in quantized]
    if not hit:
        return []
    return [
        f"{one.name} rewrites {len(set(hit))} linears (first {hit[0]}) that a pass before it has quantized: "
        f"put {one.name} before the quantizer"
    ]


def nothing_left(one: Pass, answer: Answer, current: Program) -> list[str]:
    """A quantizer that finds nothing to do because passes before it took everything."""
    taken = any("scheme" in node.meta for node in current.graph.nodes)
    if one.claim is EXACT or answer.rewrites or answer.problems or not taken:
        return []
    return [
        f"{one.name} has nothing to do: passes before it have quantized every linear that it would take. Leave it"
        " out, or let the others leave some (include=..., exclude=...)"
    ]


def nothing_matches(steps: Iterable[Step]) -> list[str]:
    """A plan none of whose passes finds anything in the model: what was found instead, and the nearest misses."""
    steps = list(steps)
    if not steps or any(step.answer.rewrites for step in steps):
        return []
    program = steps[0].program
    leaves = [program.leaf(node) for part in program.blocks for node in program.nodes(part)]
    found = Counter("other" if leaf.kind == "opaque" else leaf.kind for leaf in leaves if leaf is not None)
    if found["linear"] and any(step.what.claim is LOSSY for step in steps):
        return []  # they stay float because their scheme says so
    found["attention"] = sum(is_attention(node) for node in program.graph.nodes)
    there = ", ".join(f"{count} {kind} modules" for kind, count in found.items() if count)
    asked = dict.fromkeys(pattern for step in steps for pattern in step.what.patterns)
    misses = [
        f"{p.name} at {miss.at}: {miss.reason}" for p in asked if (miss := p.nearest(program)) is not None
    ]
    return [
        f"no pass of this plan finds anything in the model, whose blocks hold {there or 'no modules with weights'}"
        + "".join(f"; nearest miss of {miss}" for miss in misses[:3])
        + ". `qc show` prints the graph, `qc why MODEL PATTERN` says more"
    ]
