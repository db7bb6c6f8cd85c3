"""A diagram as SVG: one element without ids, scripts or anything from outside; light and dark by the reader's theme."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from html import escape

from .diagram import Box, Diagram, Mark
from .layout import Layout, Point, layout
from .palette import FILLS, INK, MARKS, MUTED, OTHER_MARK, PAPER, WIDTHS, WIRE, Colour, fill_of
from .shapes import LINE, mono, n, sans, shape, size_of

MARGIN = 24.0
HEAD = 44.0
"""Height of the title."""
LANE = 16.0
"""Between two brackets."""
CAPTION = 20.0
"""Height of a caption."""


def svg(diagram: Diagram, *, style: bool = True) -> str:
    """The diagram as an ``<svg>`` element, without ids or scripts: same diagram, same bytes.

    Args:
        diagram: What to draw.
        style: Whether the element brings its style. Without, ``STYLE`` must be on the page once.
    """
    late = frozenset(box.id for box in diagram.boxes if box.kind == "input" and box.id != "in0")
    sizes = {box.id: size_of(box) for box in diagram.boxes}
    placed = layout(sizes, [(arrow.source, arrow.target) for arrow in diagram.arrows], late)
    gutter = list(_gutter(diagram, placed))
    aside = max((right for _, right in gutter), default=placed.width)
    legend = list(_legend(diagram, placed.height + 34, max(aside, 420)))
    width = max(aside, mono(diagram.title, 15), *(right for _, right, _ in legend), 200) + 2 * MARGIN
    height = HEAD + placed.height + 2 * MARGIN + (legend[-1][2] - placed.height if legend else 0)
    body = [
        *(element for box in diagram.boxes for element in _box(diagram, box, placed)),
        *_arrows(diagram, placed),
        *(element for element, _ in gutter),
        *(element for element, _, _ in legend),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="qc-svg" role="img" width="{n(width)}"'
            f' height="{n(height)}" viewBox="0 0 {n(width)} {n(height)}">',
            f"<title>{escape(diagram.title)}</title>",
            *([f"<style>{STYLE}</style>"] if style else []),
            f'<rect class="qc-paper" width="{n(width)}" height="{n(height)}"/>',
            f'<text class="qc-head" x="{n(MARGIN)}" y="{n(MARGIN + 14)}">{escape(diagram.title)}</text>',
            f'<g transform="translate({n(MARGIN)} {n(MARGIN + HEAD - 10)})">',
            *body,
            "</g>",
            "</svg>",
            "",
        ]
    )


def _box(diagram: Diagram, box: Box, placed: Layout) -> Iterator[str]:
    place = placed.places[box.id]
    pale = " qc-pale" if box.id in diagram.dimmed else ""
    yield f'<g class="qc-box qc-{box.kind}{pale}">'
    if box.rows:
        yield f"<title>{escape(chr(10).join(box.rows))}</title>"
    yield from shape(box, place)
    yield "</g>"
    marks = [mark for mark in diagram.marks if box.id in mark.boxes and not mark.space]
    for i, mark in enumerate(marks):
        y = place.y + (i - (len(marks) - 1) / 2) * 10
        yield (
            f'<circle class="qc-dot {_class(mark)}" cx="{n(place.x + place.width / 2)}" cy="{n(y)}" r="4.5">'
            f"<title>{escape(mark.caption)}</title></circle>"
        )


def _class(mark: Mark) -> str:
    return f"qc-m-{mark.pattern}" if mark.pattern in MARKS else "qc-m-other"


def _arrows(diagram: Diagram, placed: Layout) -> Iterator[str]:
    """Plain arrows first, then those of marks on top; one that is on two belongs to the first."""
    of = {i: mark for mark in reversed(diagram.marks) for i in mark.arrows}
    for i in sorted(range(len(diagram.arrows)), key=lambda i: (i in of, i)):
        arrow, mark = diagram.arrows[i], of.get(i)
        pale = diagram.dimmed and mark is None
        name = f"qc-wire {_class(mark)}" if mark else "qc-wire" + (" qc-pale" if pale else "")
        (x, y) = placed.paths[i][-1]
        yield (
            f'<g class="{name}"><title>{escape(arrow.type)}</title><path d="{_curve(placed.paths[i])}"/>'
            f'<polygon points="{n(x)},{n(y)} {n(x - 4)},{n(y - 8)} {n(x + 4)},{n(y - 8)}"/></g>'
        )


def _curve(points: Sequence[Point]) -> str:
    """A way through points, vertical in every one of them, that ends at the foot of its arrowhead."""
    *first, (x, y) = points
    points = [*first, (x, y - 7)]
    said = [f"M{n(points[0][0])} {n(points[0][1])}"]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if abs(x0 - x1) < 0.3:
            said.append(f"L{n(x1)} {n(y1)}")
        else:
            middle = (y1 - y0) / 2
            said.append(f"C{n(x0)} {n(y0 + middle)} {n(x1)} {n(y1 - middle)} {n(x1)} {n(y1)}")
    return "".join(said)


def _gutter(diagram: Diagram, placed: Layout) -> Iterator[tuple[str, float]]:
    """A bracket and a caption to the right for every mark: the elements, and how far they reach."""
    spans = []
    for mark in diagram.marks:
        places = [placed.places[id] for id in mark.boxes]
        spans.append((min(p.y - p.height / 2 for p in places), max(p.y + p.height / 2 for p in places)))
    order = sorted(range(len(spans)), key=lambda i: (spans[i][1] - spans[i][0], spans[i]))
    lanes: list[list[tuple[float, float]]] = []
    lane_of: dict[int, int] = {}
    for i in order:
        top, bottom = spans[i]
        lane = next(
            (k for k, taken in enumerate(lanes) if all(bottom < t or top > b for t, b in taken)), len(lanes)
        )
        lanes.extend([[]] if lane == len(lanes) else [])
        lanes[lane].append((top, bottom))
        lane_of[i] = lane
    words = placed.width + 26 + LANE * len(lanes) + 6
    heights = _spread([(spans[i][0] + spans[i][1]) / 2 for i in range(len(spans))])
    for i, mark in enumerate(diagram.marks):
        (top, bottom), x = spans[i], placed.width + 26 + LANE * lane_of[i]
        middle = (top + bottom) / 2
        path = (
            f"M{n(x - 5)} {n(top)}H{n(x)}V{n(bottom)}H{n(x - 5)}M{n(x)} {n(middle)}"
            f"C{n((x + words) / 2)} {n(middle)} {n((x + words) / 2)} {n(heights[i])} {n(words - 4)} {n(heights[i])}"
        )
        name, _, by = mark.caption.partition(": ")
        by = f'<tspan class="qc-by" dx="7">{escape(by)}</tspan>' if by else ""
        yield (
            f'<g class="qc-bracket {_class(mark)}"><path d="{path}"/>'
            f'<text x="{n(words)}" y="{n(heights[i] + 4)}">{escape(name)}{by}</text></g>',
            words + sans(mark.caption, 12.5),
        )


def _spread(wanted: Sequence[float]) -> list[float]:
    """Heights of captions, each near where it is wanted and none over another."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    at: dict[int, float] = {}
    last = float("-inf")
    for i in order:
        at[i] = last = max(wanted[i], last + CAPTION)
    return [at[i] for i in range(len(wanted))]


def _legend(diagram: Diagram, top: float, room: float) -> Iterator[tuple[str, float, float]]:
    """What the colours say, of those that occur: the element, how far right and how far down it reaches."""
    things = [(box.kind, box.bits) for box in diagram.boxes]
    things += [(chip.kind, chip.bits) for box in diagram.boxes for _, chips in box.chips for chip in chips]
    names = [fill_of(kind, bits) for kind, bits in things]
    words = {f"w{bits}": f"linear, {text}" for bits, text in WIDTHS.items()}
    words |= {
        "norm": "norm",
        "inserted": "online op that a pass inserted",
        "stub": "q, k or v on an int8 grid",
    }
    x, y = 0.0, top
    for name, text in words.items():
        if name not in names:
            continue
        width = 24 + sans(text, LINE + 0.5) + 16
        if x and x + width > room:
            x, y = 0.0, y + 24
        yield (
            f'<g><rect class="qc-area qc-{name}" x="{n(x)}" y="{n(y)}" width="16" height="12" rx="3"/>'
            f'<text class="qc-legend" x="{n(x + 22)}" y="{n(y + 10)}">{escape(text)}</text></g>',
            x + width,
            y + 12,
        )
        x += width


def _style() -> str:
    def theme(which: str) -> str:
        def c(colour: Colour) -> str:
            return getattr(colour, which)

        rules = [
            f".qc-paper{{fill:{c(PAPER)}}}",
            f".qc-head,.qc-title,.qc-chip,.qc-join{{fill:{c(INK)}}}",
            f".qc-line,.qc-edit,.qc-legend{{fill:{c(MUTED)}}}",
            f".qc-edit .qc-by{{fill:{c(INK)}}}.qc-bracket .qc-by{{fill:{c(MUTED)}}}",
            f".qc-wire path{{stroke:{c(WIRE)}}}.qc-wire polygon{{fill:{c(WIRE)}}}",
        ]
        for name, fill in FILLS.items():
            rules.append(f".qc-area.qc-{name}{{fill:{c(fill.area)};stroke:{c(fill.edge)}}}")
            rules.append(f".qc-pill.qc-{name}{{fill:{c(fill.edge)}}}.qc-on.qc-{name}{{fill:{c(fill.on)}}}")
            rules.append(f".qc-format.qc-{name}{{fill:{c(fill.edge)}}}")
        for name, colour in (*MARKS.items(), ("other", OTHER_MARK)):
            own = f".qc-m-{name}"
            rules.append(f"{own} path{{stroke:{c(colour)}}}{own} polygon,{own} text{{fill:{c(colour)}}}")
            rules.append(f"{own}.qc-dot{{fill:{c(colour)};stroke:{c(PAPER)}}}")
        return "".join(rules)

    code = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
    prose = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
    common = (
        f".qc-svg text{{font-family:{code}}}"
        f".qc-svg .qc-bracket text,.qc-svg .qc-legend{{font-family:{prose}}}"
        ".qc-head{font-size:15px;font-weight:600}.qc-title{font-size:13px;font-weight:600}"
        ".qc-line,.qc-chip{font-size:11px}.qc-edit,.qc-format{font-size:10.5px}.qc-legend{font-size:11.5px}"
        ".qc-on{font-size:10.5px;font-weight:600;text-anchor:middle}.qc-format{font-weight:600;text-anchor:end}"
        ".qc-mid{text-anchor:middle}.qc-join{font-size:16px;text-anchor:middle}"
        ".qc-area{stroke-width:1.4}.qc-input .qc-area,.qc-output .qc-area{stroke-dasharray:3 3}"
        ".qc-inserted .qc-area,.qc-stub .qc-area{stroke-width:1.8}.qc-attention .qc-area{stroke-width:2.4}"
        ".qc-wire path{fill:none;stroke-width:1.4}.qc-wire[class*=qc-m-] path{stroke-width:2.6}"
        ".qc-m-residual path{stroke-width:3.4}"
        ".qc-bracket path{fill:none;stroke-width:1.6}.qc-bracket text{font-size:12.5px;font-weight:600}"
        ".qc-bracket .qc-by{font-weight:400}.qc-dot{stroke-width:1.5}.qc-pale{opacity:.35}"
    )
    return f"{common}{theme('light')}@media (prefers-color-scheme:dark){{{theme('dark')}}}"


STYLE = _style()
"""The style of every drawing; its classes begin with ``qc-``."""
