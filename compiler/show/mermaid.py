"""A diagram as Mermaid text, which GitHub, GitLab and many editors draw: https://mermaid.js.org/syntax/flowchart.html"""

from __future__ import annotations

from .diagram import Box, Diagram
from .palette import FILLS, INK, fill_of, mark_of

SHAPES = {
    "join": ("((", "))"), "norm": ("([", "])"), "inserted": ("{{", "}}"), "stub": ("[/", "/]"),
    "input": ("(", ")"), "output": ("(", ")"), "attention": ("[[", "]]"), "alike": ("[[", "]]"),
}  # fmt: skip


def mermaid(diagram: Diagram) -> str:
    """The diagram as a Mermaid flowchart."""
    ids = {box.id: f"n{i}" for i, box in enumerate(diagram.boxes)}
    lines = ["---", f"title: {diagram.title}", "---", "flowchart TB"]
    for box in diagram.boxes:
        left, right = SHAPES.get(box.kind, ("[", "]"))
        lines.append(f'  {ids[box.id]}{left}"{"<br>".join(_escaped(word) for word in words(box))}"{right}')
    for arrow in diagram.arrows:
        lines.append(f"  {ids[arrow.source]} --> {ids[arrow.target]}")
    for k, mark in enumerate(diagram.marks):
        lines.append(f'  m{k}>"{_escaped(mark.caption)}"]')
        lines.append(f"  m{k} -.- {ids[mark.boxes[0]]}")
    owner = {i: mark for mark in reversed(diagram.marks) for i in mark.arrows}
    for i in sorted(owner):
        lines.append(f"  linkStyle {i} stroke:{mark_of(owner[i].pattern).light},stroke-width:3px")
    used: dict[str, list[str]] = {}
    for box in diagram.boxes:
        used.setdefault(fill_of(box.kind, box.bits), []).append(ids[box.id])
    for name, fill in FILLS.items():
        if name in used:
            lines.append(
                f"  classDef {name} fill:{fill.area.light},stroke:{fill.edge.light},color:{INK.light}"
            )
            lines.append(f"  class {','.join(used[name])} {name}")
    for k, mark in enumerate(diagram.marks):
        colour = mark_of(mark.pattern).light
        lines.append(f"  style m{k} fill:#ffffff,stroke:{colour},color:{colour}")
    for box in diagram.boxes:
        if box.id in diagram.dimmed:
            lines.append(f"  style {ids[box.id]} opacity:0.4")
    return "\n".join(lines) + "\n"


def words(box: Box) -> list[str]:
    """The lines of text in a box."""
    head = f"{box.title} · {box.format}" if box.format else box.title
    held = [
        f"{holder + ': ' if holder else ''}"
        + ", ".join(f"{chip.title} {chip.format}".strip() for chip in chips)
        for holder, chips in box.chips
    ]
    return [head, *box.lines, *box.edits, *held]


def _escaped(text: str) -> str:
    """Text inside quotes: quotes and angle brackets are entities, and ``#`` begins one."""
    named = text.replace("#", "#35;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")
    return named if named not in ("+", "-") else f" {named} "
