"""Refine: a calibration set without the samples that hurt, with the bad cases that the user adds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import registry
from .calib_file import write_samples
from .calibration import Sample, read_samples, windows
from .certify import vocabulary
from .compile import Model, Options, Passes, compute_dtype, filled
from .compile import plan as planned
from .contract import Fact, Pass
from .errors import Refused
from .leave_one_out import Trial, block_errors
from .load import load_tokenizer
from .plan import Plan, all_have_formats, make_plan
from .program import Program
from .scheme import Rule
from .solve import MICROBATCH, Progress
from .survey import survey

FEWEST = 8
"""Samples below which there is nobody to judge."""
JUDGES = 8
"""Sequences that judge at most."""
LEAST = 2
"""Sequences that judge at least: one has no standard error."""


@dataclass(frozen=True)
class Gain:
    """What leaving something out does to the error of the blocks, as a share of it; above zero is an improvement."""

    mean: float
    error: float
    """Standard error over the sequences that judge."""

    @property
    def sure(self) -> float:
        """What is left of it two standard errors lower."""
        return self.mean - 2 * self.error

    def is_worth(self, share: float) -> bool:
        """Whether it is at least so large, and beyond doubt."""
        return self.mean >= share and self.sure > 0

    def __str__(self) -> str:
        return f"{-100 * self.mean:+.2f} % ± {100 * self.error:.2f}"


@dataclass(frozen=True)
class Verdict:
    """A sample, and what leaving it out does to the others."""

    sample: Sample
    gain: Gain
    dropped: bool = False


@dataclass(frozen=True)
class Refinement:
    """What a refinement did."""

    path: Path
    plan: str
    length: int
    judges: int
    """Sequences that judged each sample."""
    verdicts: tuple[Verdict, ...]
    """One per sample that was looked at, the one that hurts most first."""
    added: int
    """Bad cases."""
    kept: int
    """Samples in the new file, bad cases included."""
    checked: Gain | None
    """Of what was dropped, on sequences that had no say in it; None where nothing was."""
    refuted: bool
    """Whether samples that seemed to hurt stay, because the check did not confirm it."""
    on_added: Gain | None
    """Of the new set as a whole, on the bad cases; None where there are none."""
    on_others: Gain | None
    """Of the new set as a whole, on the sequences of the check; None where nothing changes."""
    notes: tuple[str, ...] = ()
    seemed: int = 0
    """Samples that seemed to hurt, each alone."""

    @property
    def dropped(self) -> tuple[Verdict, ...]:
        """The samples that are left out."""
        return tuple(verdict for verdict in self.verdicts if verdict.dropped)


def refine(
    model: Model | Program, passes: Passes, out: str | Path, options: Options | None = None, *,
    add: Sequence[str | Path] = (), judge: Sequence[str | Path] = (), worth: float = 1.0, most: float = 0.25,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Refinement:  # fmt: skip
    """Find the samples of a calibration set whose absence lowers the error of the quantized blocks, and leave them out.

    Args:
        model: As for a compile.
        passes: What the set is to calibrate. Passes that train are stood in for, see ``stand_ins``.
        out: The file to write.
        options: As for a compile. ``calib`` is the set; its first ``samples`` texts are looked at, of each the first
            ``length`` tokens.
        add: Files of bad cases: they are added to the set.
        judge: Texts on which errors are measured; none takes samples of the set, each time some that are in no set
            compared.
        worth: Per cent of the error that a sample has to cost to be dropped, alone and beside what is dropped before
            it. It has to be two standard errors too.
        most: Largest share of the samples that is dropped.
        report: Told of the progress.

    Raises:
        Refused: Nothing depends on calibration data, there are too few samples, or an input is not acceptable.
    """
    options = options or Options()
    if not 0 <= worth < 100 or not 0 < most <= 0.5:
        raise Refused(f"--worth {worth:g} --most {most:g}: per cent below 100, and a share up to 0.5")
    data = tuple(filled(passes, options).calib)
    if not data:
        raise Refused("no calibration set: give --calib FILE, the samples to refine")
    write_samples(out, None, force=options.force, inputs=[Path(f) for f in (*data, *add, *judge)])
    samples = [one for one in read_samples(data) if one.text.strip()]
    bad = [one for one in read_samples(add) if one.text.strip()]
    looked_at = samples[: options.samples]
    if len(looked_at) < min(FEWEST, len(samples)):
        raise Refused(f"--samples {options.samples}: leaving one out takes at least {FEWEST}")
    if len(looked_at) < FEWEST:
        there = "1 sample" if len(looked_at) == 1 else f"{len(looked_at)} samples"
        raise Refused(
            f"{there} in {', '.join(map(str, data))}: leaving one out takes at least {FEWEST} (a line of a .jsonl is a"
            " sample, a .txt is one)"
        )
    wanted = planned(model, passes, options).require()
    trial, notes = stand_ins(wanted)
    tokens = _Tokens(wanted.program, options)
    own = [tokens.of(one) for one in looked_at]
    sequences = own + [tokens.of(one) for one in bad]
    others = tokens.windows(judge, 2 * JUDGES) if judge else []
    judges = Judges(len(own), options.seed, range(len(sequences), len(sequences) + len(others)))
    sequences += others
    compute = compute_dtype(trial.program, options)
    _survey(trial, tokens, data, compute)

    def measure(trials: Sequence[Trial]) -> list[dict[int, float]]:
        return block_errors(trial, sequences, trials, compute, report)

    whole = frozenset(range(len(own)))
    gains = leave_one_out(whole, judges, measure)
    hurts = [i for i in sorted(whole, key=lambda i: (-gains[i].sure, i)) if gains[i].is_worth(worth / 100)]
    cases = tuple(range(len(own), len(own) + len(bad)))
    check = Check(whole, hurts[: int(most * len(own))], cases, judges)
    if check.hurts or cases:
        check.run(measure, worth / 100)
    drop = frozenset() if check.refutes else check.drop
    kept = [one for i, one in enumerate(looked_at) if i not in drop] + samples[len(looked_at) :] + bad
    path = write_samples(
        out, [one.line for one in kept], force=options.force, inputs=map(Path, (*data, *add, *judge))
    )
    return Refinement(
        path=path, plan=_spelled(wanted), length=options.length, judges=len(judges.of(0)),
        verdicts=tuple(
            Verdict(looked_at[i], gains[i], i in drop) for i in sorted(whole, key=lambda i: (-gains[i].mean, i))
        ),
        added=len(bad), kept=len(kept), checked=check.checked, refuted=check.refutes,
        on_added=check.gain(len(drop), cases) if cases else None,
        on_others=check.gain(len(drop), check.last) if drop or cases else None,
        notes=notes, seemed=len(hurts),
    )  # fmt: skip


def stand_ins(plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """The plan with a quantizer that trains replaced by ``linear_quant`` of the same formats and places, and a note.

    Its scales come from a clip search that the inputs weigh (``weight_method=clip``), as those of ``gptq`` do.

    Raises:
        Refused: Another pass trains, or nothing is solved on calibration data.
    """
    plain: Any = registry.get("passes", "linear_quant")
    chosen: list[Pass] = []
    notes: list[str] = []
    for step in plan.steps:
        one: Any = step.what
        if not one.needs_training:
            chosen.append(one)
        elif Fact.QUANTIZED in one.provides and hasattr(one, "strategies"):
            strategies = tuple(
                replace(r, weight_method=None) if isinstance(r, Rule) else r for r in one.strategies
            )
            chosen.append(
                plain(weight_method="clip", strategies=strategies, include=one.include, exclude=one.exclude)
            )
            notes.append(f"{one.name} trains, and linear_quant{{weight_method=clip}} stands in for it")
        else:
            raise Refused(
                f"{one.name} trains, and without a sample it would have to train again: refine with a rotation that is "
                "not learned in its place, quarot{online=true} or online_rotation, or leave it out"
            )
    trial = make_plan(
        plan.program, chosen, scheme=None if all_have_formats(chosen) else plan.scheme, target=plan.target, tp=plan.tp,
        seed=plan.seed, calibrate_all_experts=False,
    ).require()  # fmt: skip
    if not trial.needs_data:
        raise Refused(
            f"{_spelled(plan)}: nothing of it is solved on calibration data, so no sample can hurt. Refine for passes "
            "that smooth, search, or have static ranges"
        )
    return trial, tuple(notes)


class Judges:
    """Which sequences judge: of the set itself two groups and, for the check, a third; or sequences from outside.

    A sample of the first group is judged by the second and all others by the first, and who judges is in neither of
    the sets that it compares.
    """

    def __init__(self, samples: int, seed: int, outside: Sequence[int] = ()) -> None:
        self.outside = tuple(outside)
        if self.outside:
            if len(self.outside) < 2 * LEAST:
                raise Refused(
                    f"--judge: the text has {len(self.outside)} windows, and {2 * LEAST} are needed to tell a gain from"
                    " noise; give more text, or a smaller --length"
                )
            self.groups: tuple[tuple[int, ...], ...] = (self.outside[::2], self.outside[1::2])
            return
        size = max(LEAST, min(JUDGES, samples // 4))
        self.order = list(range(samples))
        random.Random(f"{seed} judges").shuffle(self.order)
        self.groups = (tuple(self.order[:size]), tuple(self.order[size : 2 * size]))

    def of(self, sample: int) -> tuple[int, ...]:
        """Who judges a sample."""
        return self.groups[1] if sample in self.groups[0] else self.groups[0]

    @property
    def judging(self) -> tuple[tuple[int, ...], ...]:
        """The groups that judge a sample."""
        return self.groups[:1] if self.outside else self.groups

    def last(self, dropped: frozenset[int]) -> tuple[int, ...]:
        """Who checks what is to be dropped: sequences that judged nothing."""
        if self.outside:
            return self.groups[1]
        said = {*self.groups[0], *self.groups[1], *dropped}
        return tuple(i for i in self.order if i not in said)[:JUDGES]

    def checkable(self, hurts: Sequence[int]) -> Sequence[int]:
        """The first of some samples, as many as leave `LEAST` sequences to judge them again and `LEAST` to check."""
        for count in range(len(hurts), 0, -1):
            without = frozenset(hurts[:count])
            again = [i for group in self.judging for i in group if i not in without]
            if min(len(again), len(self.last(without))) >= LEAST:
                return hurts[:count]
        return ()


def leave_one_out(
    whole: frozenset[int], judges: Judges, measure: Callable[[Sequence[Trial]], list[dict[int, float]]]
) -> dict[int, Gain]:
    """For each sample what its absence does to the error on its judges."""
    groups = list(dict.fromkeys(judges.of(i) for i in sorted(whole)))
    trials = [Trial(whole, ())]
    trials += [Trial(whole - set(group), group) for group in groups]
    trials += [Trial(whole - set(judges.of(i)) - {i}, judges.of(i)) for i in sorted(whole)]
    found = measure(trials)
    base = dict(zip(groups, found[1:], strict=False))
    return {
        i: gain_of(base[judges.of(i)], errors, judges.of(i))
        for i, errors in zip(sorted(whole), found[1 + len(groups) :], strict=True)
    }


def gain_of(before: Mapping[int, float], after: Mapping[int, float], judged: Sequence[int]) -> Gain:
    """``sum (before - after) / sum before`` over sequences, with its standard error."""
    differences = torch.tensor([before[q] - after[q] for q in judged], dtype=torch.float64)
    total = sum(before[q] for q in judged)
    if total <= 0:
        return Gain(0.0, 0.0)
    error = float(differences.std()) * len(judged) ** 0.5 if len(judged) > 1 else math.inf
    return Gain(float(differences.sum()) / total, error / total)


class Check:
    """One sample after another left out, on those who judge and on sequences that had no say; and the bad cases.

    The gain of a sample alone is not its gain beside others. So of the samples that seem to hurt, the surest first, as
    many are dropped as each still helps those who judge when the ones before it are gone.
    """

    def __init__(
        self, whole: frozenset[int], hurts: Sequence[int], cases: tuple[int, ...], judges: Judges
    ) -> None:
        hurts = judges.checkable(hurts)
        self.hurts, self.cases, self.last = hurts, cases, judges.last(frozenset(hurts))
        self.drop: frozenset[int] = frozenset()
        self.errors: dict[tuple[int, bool], dict[int, float]] = {}
        self.groups = [tuple(q for q in group if q not in hurts) for group in judges.judging]
        left = [whole - set(hurts[:count]) for count in range(len(hurts) + 1)]
        self.steps = [[Trial(kept - set(group), group) for kept in left] for group in self.groups if hurts]
        self.trials = {
            (count, more): Trial(kept - set(self.last) | set(cases if more else ()), (*self.last, *cases))
            for count, kept in enumerate(left)
            for more in ((False, True) if cases else (False,))
        }  # fmt: skip

    def run(self, measure: Callable[[Sequence[Trial]], list[dict[int, float]]], worth: float) -> None:
        """Measure all sets that are compared, and choose what is dropped: each has to be worth so much."""
        steps = [trial for group in self.steps for trial in group]
        found = measure([*self.trials.values(), *steps])
        self.errors = dict(zip(self.trials, found, strict=False))
        judged = [q for group in self.groups for q in group]
        each = len(self.hurts) + 1
        rest = found[len(self.trials) :]
        for count in range(1, each):
            before, after = (
                {k: v for one in rest[c::each] for k, v in one.items()} for c in (count - 1, count)
            )
            if not gain_of(before, after, judged).is_worth(worth):
                break
            self.drop = frozenset(self.hurts[:count])

    @property
    def checked(self) -> Gain | None:
        """Of dropping alone."""
        return (
            gain_of(self.errors[0, False], self.errors[len(self.drop), False], self.last)
            if self.drop
            else None
        )

    @property
    def refutes(self) -> bool:
        """Whether it is in doubt that dropping helps those who had no say."""
        return self.checked is not None and self.checked.sure <= 0

    def gain(self, dropped: int, judged: Sequence[int]) -> Gain:
        """Of all that is changed."""
        return gain_of(self.errors[0, False], self.errors[dropped, bool(self.cases)], judged)


class _Tokens:
    """Texts as token ids of a program's model."""

    def __init__(self, program: Program, options: Options) -> None:
        if options.tokenizer is None and program.path is None:
            raise Refused("the model in memory has no tokenizer: give tokenizer=")
        self.tokenizer = options.tokenizer or load_tokenizer(program.path or "")
        self.length, self.rows = options.length, vocabulary(program)

    def of(self, sample: Sample) -> Tensor:
        """The first ``length`` tokens of a sample, [1, t]."""
        ids = torch.tensor(
            [self.tokenizer(sample.text, verbose=False)["input_ids"][: self.length]], dtype=torch.int64
        )
        if not ids.numel():
            raise Refused(f"{sample.where}: the tokenizer makes no token of it; take it out")
        return self._known(ids)

    def windows(self, files: Sequence[str | Path], count: int) -> list[Tensor]:
        """At most so many windows of files of text, [1, length] each."""
        texts = [one.text for one in read_samples(files)]
        ids = windows(texts, self.tokenizer, samples=count, length=self.length)
        return [self._known(row) for row in ids.split(1)]

    def _known(self, ids: Tensor) -> Tensor:
        if int(ids.max()) >= self.rows:
            raise Refused(
                f"the tokenizer gives token {int(ids.max())}, and the model's embedding has {self.rows} rows: the"
                " tokenizer belongs to another model, or the embedding was cut"
            )
        return ids


def _survey(plan: Plan, tokens: _Tokens, data: Sequence[str | Path], compute: torch.dtype) -> None:
    """Let passes that want to know the whole model first look at it."""
    if any(step.what.surveys(rewrite) for step in plan.steps for rewrite in step.answer.rewrites):
        ids = torch.cat(tokens.windows(data, 32))
        for _ in survey(plan, ids, max(1, MICROBATCH // tokens.length), compute, lambda part: None):
            pass


def _spelled(plan: Plan) -> str:
    """Passes and formats as they were asked for."""
    return f"{','.join(str(step.what) for step in plan.steps)} --scheme {plan.scheme.name}"
