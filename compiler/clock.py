"""Clock: the seconds that a compile spends on what, told by the reports of its progress."""

from __future__ import annotations

import time
from collections.abc import Callable

from .solve import Progress

BEFORE = "plan"
"""What is done before the first report: capture, plan, proof on the twin."""


class Clock:
    """A report function that hands on what it is told and keeps the time between two reports.

    Args:
        report: Where the reports go.
    """

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self.report = report
        self.stages: dict[str, float] = {}
        """Seconds by what was done: ``plan``, ``load``, a pass, ``write``."""
        self.parts: dict[str, float] = {}
        """Seconds by part of the model."""
        self._begun = self._since = time.monotonic()
        self._stage, self._part = BEFORE, ""

    def __call__(self, progress: Progress) -> None:
        """One report of the solver. What a pass says while it trains is still that pass."""
        self._turn(progress.what.split()[0], progress.part)
        self.report(progress)

    def stop(self) -> float:
        """Seconds since this clock was made; the stage in work is counted up to now."""
        self._turn(self._stage, self._part)
        return self._since - self._begun

    def _turn(self, stage: str, part: str) -> None:
        now = time.monotonic()
        spent = now - self._since
        self.stages[self._stage] = self.stages.get(self._stage, 0.0) + spent
        if self._part:
            self.parts[self._part] = self.parts.get(self._part, 0.0) + spent
        self._since, self._stage, self._part = now, stage, part
