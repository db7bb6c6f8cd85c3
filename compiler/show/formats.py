"""The formats in which a state of a program is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import registry
from ..errors import Refused
from ..program import Part
from .block import block_diagram
from .diagram import Diagram
from .dot import dot, png
from .excerpt import excerpts
from .explorer import explorer
from .html import Section, page
from .marks import only
from .mermaid import mermaid
from .overview import model_diagram
from .runs import Run, runs
from .states import State
from .svg import svg
from .text import text

SUFFIXES = {
    ".txt": "text", ".svg": "svg", ".html": "html", ".mmd": "mermaid", ".mermaid": "mermaid", ".dot": "dot",
    ".gv": "dot", ".png": "png", ".json": "model-explorer",
}  # fmt: skip


@dataclass(frozen=True)
class View:
    """What of a state is shown."""

    state: State
    part: Part | None = None
    """One part; None is the whole model."""
    pattern: str | None = None
    """Only matches of this pattern."""
    every_op: bool = False
    """A box for every row."""
    journal: Sequence[Mapping[str, Any]] = ()

    def diagram(self) -> Diagram:
        """The drawing of the part, or of the whole model as cards."""
        if self.part is not None:
            return self.block(Run((self.part,)))
        state = self.state
        firsts = [run.first for run in runs(state.program)]
        return model_diagram(
            state.program, matches=state.matches(self._names, firsts), rewrites=state.rewrites
        )

    def block(self, run: Run) -> Diagram:
        """The drawing of one run of blocks."""
        state = self.state
        drawn = block_diagram(
            state.program, run.first, matches=state.matches(self._names, [run.first]), rewrites=state.rewrites,
            whole=not self.every_op, run=run,
        )  # fmt: skip
        return only(drawn) if self.pattern else drawn

    @property
    def _names(self) -> list[str] | None:
        return [self.pattern] if self.pattern else None

    def text(self) -> str:
        """The canonical text, or the rows of the matches of the pattern."""
        if self.pattern:
            return excerpts(self.state, self.pattern, self.part)
        return text(self.state.program, part=self.part, rewrites=self.state.rewrites, journal=self.journal)

    def html(self) -> str:
        """A page with the drawing, and of a whole model with one of every run."""
        if self.part is not None:
            return page(self.part.name, [Section(self.diagram(), self.text())])
        whole = self.diagram()
        sections = [Section(replace(whole, title="the whole model"))]
        for run in runs(self.state.program):
            own = replace(self, part=run.first)
            sections.append(Section(self.block(run), own.text()))
        return page(whole.title, sections)


FORMATS: Mapping[str, Callable[[View], str | bytes]] = {
    "text": View.text,
    "mermaid": lambda view: mermaid(view.diagram()),
    "dot": lambda view: dot(view.diagram()),
    "svg": lambda view: svg(view.diagram()),
    "png": lambda view: png(view.diagram()),
    "html": View.html,
    "model-explorer": lambda view: explorer(view.state.program, view.part),
}


def format_of(name: str | None, out: Path | None) -> str:
    """The format that was asked for: by name, else by the suffix of the file, else text.

    Raises:
        Refused: There is no such format, or the suffix says none.
    """
    if name is not None:
        if name not in FORMATS:
            raise Refused(f"--format: {registry.unknown('format', name, FORMATS)}")
        return name
    if out is None:
        return "text"
    if out.suffix.lower() not in SUFFIXES:
        there = ", ".join(SUFFIXES)
        raise Refused(f"--out {out}: its suffix says no format: give --format, or one of {there}")
    return SUFFIXES[out.suffix.lower()]
