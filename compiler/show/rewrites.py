"""Rewrites as text: one line each, with its edits, its claim, and its certificate where a compile has made one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..contract import Rewrite
from ..edit import Edit
from ..program import Part, Program
from .runs import Run

MOST_MODULES = 3
"""Modules that a line names of one kind of edit; of more it gives the number."""


class Told:
    """The rewrites of a program by the part that they lie in, and what a journal says of them."""

    def __init__(
        self, program: Program, rewrites: Sequence[Rewrite], journal: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        place = {str(n.target): n.meta["part"] for n in program.graph.nodes if n.op == "call_module"}
        self._of: dict[int, list[Rewrite]] = {}
        self._across: list[Rewrite] = []
        for rewrite in rewrites:
            parts = {place.get(module, self._holder(program, module)) for module in rewrite.modules}
            if len(parts) == 1:
                self._of.setdefault(parts.pop(), []).append(rewrite)
            else:
                self._across.append(rewrite)
        self._entries: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for entry in journal:
            if "pass" in entry:
                self._entries.setdefault((entry["pass"], entry["where"]), []).append(entry)

    @staticmethod
    def _holder(program: Program, module: str) -> int:
        """The part whose name begins the name of a module that is no node of its own."""
        return next((p.index for p in program.blocks if module.startswith(p.name + ".")), 0)

    def lines(self, run: Run) -> list[str]:
        """A line per rewrite of the first part of a run; a certificate is the worst of all of its parts."""
        others = [self._of.get(part.index, []) for part in run.parts[1:]]
        found = []
        for i, rewrite in enumerate(self._of.get(run.first.index, [])):
            alike = [
                rewrite,
                *(own[i] for own in others if i < len(own) and own[i].pass_name == rewrite.pass_name),
            ]
            found.append(self._line(rewrite, run.first, alike))
        return found

    def across(self) -> list[str]:
        """A line per rewrite that lies in several parts."""
        return [self._line(rewrite, None, [rewrite]) for rewrite in self._across]

    def _line(self, rewrite: Rewrite, part: Part | None, alike: Sequence[Rewrite]) -> str:
        prefix = part.name + "." if part is not None and part.kind >= 0 else ""
        pattern = rewrite.pattern.replace("_", "-")
        where = rewrite.where.removeprefix(prefix)
        edits = "; ".join(_edits(rewrite.edits, prefix))
        claim = rewrite.claim.name.lower() + self._certificate(alike)
        return f"{rewrite.pass_name} {pattern} at {where}: {claim}; {edits}"

    def _certificate(self, alike: Sequence[Rewrite]) -> str:
        found = [
            entry["certificate"]
            for rewrite in alike
            for entry in self._entries.get((rewrite.pass_name, rewrite.where), ())
            if "certificate" in entry
        ]
        if not found:
            return ""
        math, stored = (max(one[kind] for one in found) for kind in ("math", "stored"))
        return f", proved, error {math:.1e} (float64), {stored:.1e} as stored"


def _edits(edits: Sequence[Edit], prefix: str) -> list[str]:
    """What is done to which modules, equal verbs and operands together."""
    groups: dict[str, dict[str, None]] = {}
    for edit in edits:
        verb, _, rest = str(edit).partition(" ")
        operand = rest.removeprefix(str(edit.site)).strip()
        groups.setdefault(f"{verb} {operand}".strip(), {})[edit.site.module.removeprefix(prefix)] = None
    return [
        f"{what} of {', '.join(modules) if len(modules) <= MOST_MODULES else f'{len(modules)} modules'}"
        for what, modules in groups.items()
    ]
