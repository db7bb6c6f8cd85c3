"""Colours of drawings, light and dark.

Text on them has a contrast of at least 4.5 to 1. Blue, orange and purple are told apart by people who do not see all
colours, and no colour stands without a word that says the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """One colour in the light and in the dark theme, ``#rrggbb``."""

    light: str
    dark: str


PAPER = Colour("#ffffff", "#10161d")
INK = Colour("#17212b", "#e8eef4")
MUTED = Colour("#52606d", "#a3b1bf")
WIRE = Colour("#8896a5", "#66778a")


@dataclass(frozen=True)
class Fill:
    """How a kind of box is painted: its area, its edge, and the pill with its format (the text on it is ``on``)."""

    area: Colour
    edge: Colour
    on: Colour


ON_PILL = Colour("#ffffff", "#10161d")
FILLS = {
    "w16": Fill(Colour("#f3f5f8", "#1d2733"), Colour("#667585", "#94a5b7"), ON_PILL),
    "w8": Fill(Colour("#e3effb", "#12304a"), Colour("#1a66a8", "#6cb4f0"), ON_PILL),
    "w4": Fill(Colour("#fdebd7", "#44290d"), Colour("#a64d00", "#f5a55a"), ON_PILL),
    "w2": Fill(Colour("#f8e4f2", "#431a39"), Colour("#9a2070", "#f08fcf"), ON_PILL),
    "inserted": Fill(Colour("#fff5c7", "#37300a"), Colour("#7a6000", "#e8cc4d"), ON_PILL),
    "stub": Fill(Colour("#dff4ea", "#12352a"), Colour("#17704f", "#5fd0a0"), ON_PILL),
    "norm": Fill(Colour("#f0eefb", "#26233d"), Colour("#5d52a8", "#aaa0f0"), ON_PILL),
    "plain": Fill(PAPER, Colour("#8896a5", "#66778a"), ON_PILL),
}
MARKS = {
    "norm_linear": Colour("#00706f", "#45cfc6"),
    "ov": Colour("#7636b8", "#c09bf8"),
    "up_down": Colour("#b01f5c", "#f78fb6"),
    "linear_linear": Colour("#5a6600", "#c3cf4a"),
    "relu_linear": Colour("#5a6600", "#c3cf4a"),
    "residual": Colour("#34495e", "#b0c4d8"),
}
OTHER_MARK = Colour("#5a6600", "#c3cf4a")
"""Of patterns of other people."""

WIDTHS = {16: "float", 8: "8-bit weights", 4: "4-bit weights", 2: "weights of 2 or 3 bits"}


def fill_of(kind: str, bits: int) -> str:
    """The name in `FILLS` of a box."""
    if bits:
        return "w16" if bits >= 16 else "w8" if bits > 4 else "w4" if bits == 4 else "w2"
    return kind if kind in FILLS else "plain"


def mark_of(pattern: str) -> Colour:
    """The colour of a mark."""
    return MARKS.get(pattern, OTHER_MARK)


def contrast(one: str, other: str) -> float:
    """Contrast of two colours ``#rrggbb``, 1 to 21 (WCAG 2.1, relative luminance)."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
