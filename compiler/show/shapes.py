"""How a box is drawn: its size, and its SVG elements."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from .diagram import Box, Chip
from .layout import Place
from .palette import fill_of

MONO, SANS = 0.605, 0.56
"""Width of a character of the fonts, in font sizes: exact for the fixed one, generous for the other."""
TITLE, LINE, SMALL = 13.0, 11.0, 10.5
PAD = 12.0
JOIN = 26.0
"""Diameter of a lone sum or product."""
CHIP, CHIP_GAP = 24.0, 6.0
CHIPS_IN_ROW = 6
"""Chips side by side on a card."""


def mono(text: str, size: float) -> float:
    """Width of text in the fixed font, pixels."""
    return len(text) * size * MONO


def sans(text: str, size: float) -> float:
    """Width of text in the other font, pixels; rather too much."""
    return len(text) * size * SANS


def size_of(box: Box) -> tuple[float, float]:
    """Width and height of a box, pixels."""
    if box.kind == "join":
        return JOIN, JOIN
    width = mono(box.title, TITLE) + (mono(box.format, SMALL) + 26 if box.format else 0)
    height = 2 * 9 + TITLE + 2
    for line in box.lines:
        width, height = max(width, mono(line, LINE)), height + 15
    for edit in box.edits:
        width, height = max(width, mono(edit, SMALL) + 12), height + 14
    height += 6 if box.edits else 0
    for holder, chips in box.chips:
        rows = _rows(chips)
        label = mono(holder, LINE) + 12
        width = max(width, *(label + sum(_chip(c) + CHIP_GAP for c in row) for row in rows))
        height += len(rows) * (CHIP + CHIP_GAP) + 4
    side = 2 * PAD + (10 if box.kind in ("norm", "inserted", "input", "output") else 0)
    return round(max(width + side, 60), 1), round(height, 1)


def shape(box: Box, place: Place) -> Iterator[str]:
    """The elements of a box at its place."""
    left, top = place.x - place.width / 2, place.y - place.height / 2
    paint = f"qc-{fill_of(box.kind, box.bits)}"
    yield _outline(box, place, f"qc-area {paint}")
    if box.kind == "join":
        yield f'<text class="qc-join" x="{n(place.x)}" y="{n(place.y + 5.5)}">{escape(box.title)}</text>'
        return
    centred = not box.format and not box.edits and not box.chips
    x = place.x if centred else left + PAD
    side = " qc-mid" if centred else ""
    y = top + 9 + TITLE - 1
    yield f'<text class="qc-title{side}" x="{n(x)}" y="{n(y)}">{escape(box.title)}</text>'
    if box.format:
        width = mono(box.format, SMALL) + 14
        x0 = left + place.width - PAD + 2 - width
        yield f'<rect class="qc-pill {paint}" x="{n(x0)}" y="{n(top + 8)}" width="{n(width)}" height="17" rx="8.5"/>'
        yield f'<text class="qc-on {paint}" x="{n(x0 + width / 2)}" y="{n(top + 20.3)}">{escape(box.format)}</text>'
    y += 2
    for line in box.lines:
        y += 15
        yield f'<text class="qc-line{side}" x="{n(x)}" y="{n(y)}">{escape(line)}</text>'
    y += 6 if box.edits else 0
    for edit in box.edits:
        y += 14
        name, _, what = edit.partition(" ")
        yield (
            f'<text class="qc-edit" x="{n(x)}" y="{n(y)}"><tspan class="qc-by">{escape(name)}</tspan>'
            f'<tspan dx="6">{escape(what)}</tspan></text>'
        )
    for holder, chips in box.chips:
        y += 4
        for i, row in enumerate(_rows(chips)):
            if not i:
                yield f'<text class="qc-line" x="{n(x)}" y="{n(y + 20)}">{escape(holder)}</text>'
            at = x + mono(holder, LINE) + 12
            for chip in row:
                yield from _draw_chip(chip, at, y + 4)
                at += _chip(chip) + CHIP_GAP
            y += CHIP + CHIP_GAP


def _outline(box: Box, place: Place, name: str) -> str:
    left, top = place.x - place.width / 2, place.y - place.height / 2
    if box.kind == "join":
        return f'<circle class="{name}" cx="{n(place.x)}" cy="{n(place.y)}" r="{n(JOIN / 2)}"/>'
    if box.kind == "inserted":  # cut corners: nothing that the model brought along
        right, bottom, cut = left + place.width, top + place.height, 10
        points = [
            (left + cut, top), (right - cut, top), (right, place.y), (right - cut, bottom),
            (left + cut, bottom), (left, place.y),
        ]  # fmt: skip
        return f'<polygon class="{name}" points="{" ".join(f"{n(x)},{n(y)}" for x, y in points)}"/>'
    round_ = {"norm": place.height / 2, "input": 6, "output": 6, "stub": 2}.get(box.kind, 8)
    rect = (
        f'<rect class="{name}" x="{n(left)}" y="{n(top)}" width="{n(place.width)}" height="{n(place.height)}"'
        f' rx="{n(min(round_, 22))}"/>'
    )
    if box.kind in ("alike", "run"):  # a stack of cards
        return f'<g transform="translate(5 -5)">{rect}</g>{rect}' if stacked(box) else rect
    return rect


def stacked(box: Box) -> bool:
    """Whether a box stands for several."""
    return box.kind == "alike" or box.title.endswith("alike")


def _rows(chips: tuple[Chip, ...]) -> list[tuple[Chip, ...]]:
    return [chips[i : i + CHIPS_IN_ROW] for i in range(0, len(chips), CHIPS_IN_ROW)]


def _chip(chip: Chip) -> float:
    return mono(chip.title, LINE) + (mono(chip.format, SMALL) + 8 if chip.format else 0) + 16


def _draw_chip(chip: Chip, x: float, y: float) -> Iterator[str]:
    width, paint = _chip(chip), f"qc-{fill_of(chip.kind, chip.bits)}"
    yield f'<rect class="qc-area {paint}" x="{n(x)}" y="{n(y)}" width="{n(width)}" height="{n(CHIP)}" rx="5"/>'
    yield f'<text class="qc-chip" x="{n(x + 8)}" y="{n(y + 16)}">{escape(chip.title)}</text>'
    if chip.format:
        at = x + width - 8
        yield f'<text class="qc-format {paint}" x="{n(at)}" y="{n(y + 16)}">{escape(chip.format)}</text>'


def n(value: float) -> str:
    """A number of an SVG: at most one digit after the point."""
    return f"{value:.1f}".removesuffix(".0")
