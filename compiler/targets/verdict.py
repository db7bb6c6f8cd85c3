"""Verdict: whether a consumer loads a directory, refuses it, or silently ruins it (``qc verify DIR --target``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import Failed, Refused
from .spelled import target_named
from .target import Finding, Outcome, Target

ORDER: tuple[Outcome, ...] = ("refuses", "ruins", "warns")
SHOWN = 20
"""Kinds of findings that are printed."""


@dataclass(frozen=True)
class Verdict:
    """What a target does with a directory, and everything that says so."""

    target: str
    tp: int
    findings: tuple[Finding, ...]

    @property
    def word(self) -> Literal["loads", "refuses", "ruins"]:
        """``refuses`` before ``ruins``: what is not loaded computes nothing wrong."""
        found = {finding.outcome for finding in self.findings}
        return "refuses" if "refuses" in found else "ruins" if "ruins" in found else "loads"

    def __str__(self) -> str:
        said = {
            "loads": "it loads",
            "refuses": "the server would refuse it",
            "ruins": "the server would load it and silently ruin it",
        }[self.word]
        lines = list(_folded(self.findings))
        more = [f"  and {len(lines) - SHOWN} more kinds"] if len(lines) > SHOWN else []
        return "\n".join([f"{self.target}, tp {self.tp}: {said}", *lines[:SHOWN], *more])

    def plain(self) -> dict[str, Any]:
        """For machines."""
        return {
            "target": self.target,
            "tp": self.tp,
            "verdict": self.word,
            "findings": [dict(vars(finding)) for finding in self.findings],
        }


def verdict(path: str | Path, target: Any, tp: int = 1, trust_remote_code: bool = False) -> Verdict:
    """What a target does with a directory of files, ours or another tool's.

    Args:
        path: The directory.
        target: A target, or its spelling: ``vllm-ascend==0.18``.
        tp: Tensor-parallel ranks of the server.
        trust_remote_code: Whether Python code in the directory may say what the model looks like.

    Raises:
        Refused: No such target; the directory is no checkpoint, a header of it cannot be read, or transformers does
            not know its model.
    """
    if tp < 1:
        raise Refused(f"--tp {tp}: at least 1")
    chosen = target_named(target)
    found = chosen.judge(Path(path), tp=tp, trust_remote_code=trust_remote_code)
    if found is None:
        raise Refused(
            f"target {chosen.spelling}: its files are written and never read, so nobody says what becomes of them"
        )
    ordered = sorted(dict.fromkeys(found), key=lambda one: ORDER.index(one.outcome))
    return Verdict(chosen.spelling, tp, tuple(ordered))


def check_taken(target: Target, path: Path, tp: int, trust_remote_code: bool) -> None:
    """Ask a target of the files of a compile, as they are going to lie there; weights are not read again.

    Raises:
        Failed: It would not load them, or not as they are meant, though the plan had no problem.
    """
    if not (path / "config.json").is_file():
        return  # compiled from memory, without a config
    found = target.judge(path, tp=tp, deep=False, trust_remote_code=trust_remote_code) or ()
    wrong = [str(finding) for finding in found if finding.outcome != "warns"]
    if wrong:
        raise Failed(
            f"{target.spelling} would not take what was written, though the plan has no problem"
            f" ({len(wrong)} findings):\n" + "\n".join(wrong[:5])
        )


def _folded(findings: Iterable[Finding]) -> Iterator[str]:
    """One line for every kind of finding, with the first tensor and the number of others alike."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for one in findings:
        alike.setdefault((one.outcome, one.rule, one.message), []).append(one.tensor)
    for (outcome, rule, message), tensors in alike.items():
        more = f" and {len(tensors) - 1} more alike" if tensors[1:] else ""
        yield f"  {outcome:8} {rule:4} {tensors[0]}{more}: {message}"
