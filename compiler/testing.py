"""A ready-made test suite for a pass: everything that qc expects of one, tried on tiny random models.

``check`` runs the real thing: plans, compiles with their proofs, ``verify``, ``load``. It needs no model, no network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import registry
from .compile import Options, compile, plan
from .contract import EXACT, Fact, Pass, faults, spell
from .edit import Verb
from .errors import Failed, Refused
from .export import RUN
from .load import load
from .plan import Plan, Step, setting_at
from .program import Program
from .roles import roles_of
from .show.text import text
from .spelling import build, kind_text, kinds_of, parse
from .testing_models import FAMILIES, bare, calibration, characters, checkpoint, tiny
from .verify import verify

KINDS_OF_FACT = {
    Verb.SWAP: Fact.QUANTIZED, Verb.BRANCH: Fact.BRANCHED, Verb.WRAP: Fact.ONLINE_ROTATED,
}  # fmt: skip
"""What holds after an edit of a verb, and so has to be provided."""


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: on which model, and what is wrong (nothing where it is as it should be)."""

    what: str
    model: str
    wrong: str = ""

    def __str__(self) -> str:
        where = f" ({self.model})" if self.model else ""
        return f"{'wrong' if self.wrong else 'ok':<6}{self.what}{where}" + (
            f": {self.wrong}" if self.wrong else ""
        )


@dataclass(frozen=True)
class Report:
    """Everything that was tried of a pass, in order."""

    subject: str
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """What is not as it should be."""
        return tuple(one for one in self.findings if one.wrong)

    def __str__(self) -> str:
        return "\n".join([f"{self.subject}: {len(self.findings)} checks, {len(self.wrong)} wrong",
                          *map(str, self.findings)])  # fmt: skip


def check(
    what: Pass, *, before: Sequence[str | Pass] = (), after: Sequence[str | Pass] | None = None, scheme: str = "w8a8",
    target: str = "modelslim", families: Iterable[str] = FAMILIES, refuses: Iterable[Mapping[str, Any]] = (),
) -> Report:  # fmt: skip
    """Try a pass on tiny random models, and say everything that is wrong with it at once.

    What is tried: the contract is complete; options survive their spelling on the command line; bad options are
    refused; ``rewrite`` gives the same answer twice and changes nothing itself; where nothing matches it answers
    nothing; on every family the plan has no problem, the compile proves every exact rewrite, ``verify`` finds nothing
    wrong and the result loads and runs; a second compile writes the same bytes.

    Args:
        what: The pass, with the options that are to be tried.
        before: Passes to put before it, such as those that provide what it requires.
        after: Passes to put after it; None is ``linear_quant``, or nothing after a quantizer.
        scheme: Formats of the quantizer.
        target: Who is to load the result; by default the layout without the rules of a server.
        families: Names of ``FAMILIES``.
        refuses: Options that the pass must refuse with a ValueError, such as ``{"strength": 2.0}``.

    Returns:
        What was tried; it prints as one line per check.

    Raises:
        AssertionError: Something is wrong; the message says all of it.
    """
    rest = () if Fact.QUANTIZED in what.provides else ("linear_quant",)
    passes = (*before, what, *(rest if after is None else after))
    options = Options(
        scheme=scheme, target=target, samples=2, length=32, tokenizer=characters(), calib=(calibration(),)
    )
    found = [
        *of_the_class(what),
        *of_the_options(what, refuses),
        _tried("nothing matches", "bare", lambda: idle(what)),
    ]
    if not any(one.wrong for one in found):  # nothing more can be said of half a pass
        found += _on_models(what, passes, options, tuple(families))
    report = Report(str(what), tuple(found))
    if report.wrong:
        raise AssertionError(str(report))
    return report


def _tried(name: str, model: str, run: Callable[[], str | None]) -> Finding:
    """One check: what it returns is wrong, and so is whatever it raises."""
    try:
        return Finding(name, model, run() or "")
    except (Refused, Failed) as error:
        return Finding(name, model, str(error))
    except Exception as error:  # of a pass that is being written anything may come
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        at = f" at {last.tb_frame.f_code.co_filename}:{last.tb_lineno}" if last is not None else ""
        return Finding(name, model, f"{type(error).__name__}: {error}{at}")


def of_the_class(what: Pass) -> Iterator[Finding]:
    """The contract, as far as it can be read off the class."""
    cls = type(what)

    def contract() -> str:
        wrong = faults(cls)
        if not wrong and not cls.name.isidentifier():
            wrong.append(f"name {cls.name!r} is no name: letters, digits and _")
        strangers = {p.name for order in (cls.before, cls.after) for p in order} - {
            p.name for p in cls.patterns
        }
        wrong += [
            f"before or after speaks of {name}, which is none of its patterns" for name in sorted(strangers)
        ]
        known = [*registry.names("passes"), *registry.names("presets"), cls.name]
        others = {other for order in (cls.before, cls.after) for why in order.values() for other in why}
        wrong += [
            registry.unknown("pass in before or after", other, known)
            for other in sorted(others - set(known)) if registry.close(other, known)
        ]  # fmt: skip
        return "; ".join(wrong)

    def told() -> str:
        own = cls.__doc__ if "__doc__" in cls.__dict__ else ""
        if not own or own.startswith(f"{cls.__name__}("):  # a dataclass makes one of its own
            return f"{cls.__name__} has no docstring"
        return "summary is empty or has several lines" if len(cls.summary.splitlines()) != 1 else ""

    yield _tried("contract", "", contract)
    yield _tried("summary and docstring", "", told)


def of_the_options(what: Pass, refuses: Iterable[Mapping[str, Any]]) -> Iterator[Finding]:
    """The spelling of options, and what must not be taken."""
    cls, kinds = type(what), kinds_of(type(what))

    def made(options: Mapping[str, str]) -> Pass:
        return build(cls, cls.name, dict(options), kinds)

    def round_trip() -> str:
        name, options = parse(str(what))
        if name != cls.name or made(options) != what:
            return f"{what} reads back as {made(options)}"
        default = cls()
        for key, value in default.options().items():
            written = "none" if value is None else spell(value)
            if value != () and made({key: written}) != default:
                return f"{key}={written} is not the default, which is {value!r}"
        return ""

    def bad() -> str:
        tries: list[dict[str, str]] = [{"no_such_option": "1"}]
        for key, kind in kinds.items():
            words = kind_text(kind)
            if not words.startswith(("text", "list of text")):
                tries.append({key: "no-such-value"})
            if words.startswith("number"):
                tries.append({key: "nan"})
        tries += [{key: spell(value) for key, value in one.items()} for one in refuses]
        taken = [one for one in tries if not _refused(lambda one=one: made(one))]
        shown = "; ".join(", ".join(f"{k}={v}" for k, v in one.items()) for one in taken)
        return f"takes {shown}: raise ValueError in __post_init__" if taken else ""

    yield _tried("options survive their spelling", "", round_trip)
    yield _tried("bad options are refused", "", bad)


def _refused(make: Callable[[], Any]) -> bool:
    try:
        make()
    except Refused:
        return True
    return False


def idle(what: Pass) -> str:
    """What is wrong where there is nothing to do: in a model whose blocks hold no linear and no norm."""
    step = plan(bare(), [what], Options(scheme="float")).steps[0]
    blocks = {part.index for part in step.program.blocks}
    parts = {str(n.target): n.meta.get("part") for n in step.program.graph.nodes if n.op == "call_module"}
    touched = [name for one in step.answer.rewrites for name in one.modules if parts.get(name) in blocks]
    return f"it rewrites {touched[0]}, in a block without linears" if touched else ""


def _on_models(
    what: Pass, passes: Sequence[str | Pass], options: Options, families: Sequence[str]
) -> Iterator[Finding]:
    matched = False
    for family in families:
        program = tiny(family)
        planned: list[Plan] = []
        first = _tried("plan", family, partial(_planned, program, passes, options, planned))
        yield first
        if first.wrong:
            continue
        step = next(step for step in planned[0].steps if step.what is what)
        yield _tried("rewrite", family, partial(_answers, what, step, planned[0]))
        again = bool(step.answer.rewrites) and not matched
        matched = matched or bool(step.answer.rewrites)
        yield _tried(
            "compile, verify, load",
            family,
            lambda f=family, again=again: _compiled(what, f, passes, options, again),
        )
    yield Finding("it matches somewhere", "", "" if matched else f"no rewrite in {', '.join(families)}")


def _planned(program: Program, passes: Sequence[str | Pass], options: Options, into: list[Plan]) -> str:
    into.append(plan(program, passes, options))
    return "; ".join(into[0].problems)


def _answers(what: Pass, step: Step, planned: Plan) -> str:
    """What is wrong with the answer of a pass to one program."""
    chosen = [one.what for one in planned.steps]
    setting = setting_at(
        chosen, step.index, scheme=planned.scheme, roles=roles_of(planned.program), tp=planned.tp,
        seed=planned.seed, dtype=planned.dtype,
    )  # fmt: skip
    shown = text(step.program)
    answers = [what.rewrite(step.program, setting) for _ in range(2)]
    wrong = [] if answers[0] == answers[1] else ["rewrite answers otherwise when it is asked again"]
    if text(step.program) != shown:
        wrong.append("rewrite changes the program: answer with edits, which the plan applies to a copy")
    slots: list[Any] = []
    verbs: set[Verb] = set()
    for rewrite in answers[0].rewrites:
        wrong += [f"{rewrite.where}: no edits"] if not rewrite.edits else []
        if rewrite.pass_name != what.name:
            wrong.append(f"{rewrite.where}: pass_name is {rewrite.pass_name!r}")
        if what.claim is EXACT and rewrite.claim is not EXACT:
            wrong.append(f"{rewrite.where}: a lossy rewrite of a pass that claims to be exact")
        slots += rewrite.slots
        verbs |= {edit.verb for edit in rewrite.edits}
    if len({slot.name for slot in slots}) != len(set(slots)):
        wrong.append("two slots have one name: put the module into it")
    wrong += [
        f"it uses {verb.name} and does not provide {fact.name}"
        for verb, fact in KINDS_OF_FACT.items() if verb in verbs and fact not in what.provides
    ]  # fmt: skip
    return "; ".join(dict.fromkeys(wrong))


def _compiled(what: Pass, family: str, passes: Sequence[str | Pass], options: Options, again: bool) -> str:
    """What is wrong with the compile of a tiny model, and with its result."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, str(n)) for n in range(1 + again)]
        results = [compile(tiny(family), passes, out, options) for out in outs]
        entries = [
            e for e in results[0].journal.entries if e.get("pass") == what.name and e.get("claim") == "EXACT"
        ]
        wrong = [f"{e['where']} has no certificate" for e in entries if "certificate" not in e]
        for one in verify(outs[0], checkpoint(family)):
            wrong += [f"verify: {one.name}: {said}" for said in one.wrong[:3]]
        if again:
            first, second = ({p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} for out in outs)
            names = sorted(first.keys() | second.keys())
            differ = [name for name in names if first.get(name) != second.get(name) and name != RUN]
            wrong += [f"two compiles write different bytes: {', '.join(differ)}"] if differ else []
        with torch.no_grad():
            logits = load(outs[0])(torch.arange(2, 18).unsqueeze(0)).logits
        wrong += [] if bool(torch.isfinite(logits).all()) else ["the result computes NaN or infinity"]
    return "; ".join(wrong)
