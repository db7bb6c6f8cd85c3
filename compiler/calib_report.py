"""What a refinement found, as a text."""

from __future__ import annotations

from .calib_refine import Refinement, Verdict

SHOWN, WORDS = 5, 40
"""Samples that are shown beside the dropped ones, and characters of each."""


def report_text(found: Refinement) -> str:
    """A table of the samples that hurt most, and what was done about them."""
    shown = found.verdicts[: max(len(found.dropped) + SHOWN, SHOWN)]
    lines = [
        f"{len(found.verdicts)} samples, at most {found.length} tokens of each, for {found.plan}",
        *(f"note: {note}" for note in found.notes),
        f"error of the blocks without each, on {found.judges} sequences that are in no set:",
        "",
        *_table(shown),
    ]
    rest = found.verdicts[len(shown) :]
    if rest:
        lines.append(f"  and {len(rest)} more, up to {_change(rest[-1])}")
    lines.append("")
    if found.refuted:
        lines.append(
            f"dropped nothing: what seemed to hurt makes {found.checked} of the error elsewhere when left out"
        )
    elif found.dropped:
        lines.append(
            f"dropped {len(found.dropped)}: error {found.checked} on sequences that had no say in it"
        )
    else:
        lines.append("dropped nothing: no sample hurts enough")
    stay = found.seemed - len(found.dropped)
    if stay and not found.refuted:
        why = "no gain beside the others, more than --most, or too few left to check it"
        lines.append(f"kept {stay} that seem to hurt alone: {why}")
    if found.added:
        together = ", with all changes"
        lines.append(
            f"added {found.added}: error {found.on_added} on them, {found.on_others} elsewhere{together}"
        )
    return "\n".join([*lines, f"wrote {found.path}: {found.kept} samples"])


def _table(verdicts: tuple[Verdict, ...]) -> list[str]:
    width = max(len(_change(verdict)) for verdict in verdicts)
    return [
        f"  {_change(verdict):>{width}}  {'dropped' if verdict.dropped else '':7}  {verdict.sample.where}"
        f"  {_words(verdict.sample.text)}"
        for verdict in verdicts
    ]


def _change(verdict: Verdict) -> str:
    return str(verdict.gain)


def _words(text: str) -> str:
    plain = " ".join(text.split())
    return f'"{plain[:WORDS]}{"..." * (len(plain) > WORDS)}"'
