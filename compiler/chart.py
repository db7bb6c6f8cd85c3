"""Charts as SVG text: bars of scores, and the trade-off of bits against divergence. Same data, same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#1f2328}.t{font-size:14px;font-weight:600}.d{fill:#57606a}"
    ".b{fill:#0969da}.l{stroke:#0969da;fill:none;stroke-width:2}.a{stroke:#8c959f}.g{stroke:#d0d7de}.c{fill:#bc4c00}"
    "@media(prefers-color-scheme:dark){rect.p{fill:#0d1117}text{fill:#e6edf3}.d{fill:#9198a1}.b{fill:#4493f8}"
    ".l{stroke:#4493f8}.a{stroke:#9198a1}.g{stroke:#30363d}.c{fill:#f0883e}}</style>"
)
ROW, WIDTH = 18, 760


def bars(title: str, rows: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars, one per row, in the order given; negative values have none."""
    most = max((value for _, value in rows), default=0.0)
    most = most if most > 0 else 1.0
    label = 7 * max((len(name) for name, _ in rows), default=0) + 16
    room = max(120, WIDTH - label - 80)
    body = []
    for i, (name, value) in enumerate(rows):
        y, length = 44 + ROW * i, room * max(value, 0.0) / most
        body.append(f'<text x="{label - 8}" y="{y + 10}" text-anchor="end">{escape(name)}</text>')
        body.append(f'<rect class="b" x="{label}" y="{y}" width="{length:.1f}" height="{ROW - 5}" rx="2"/>')
        body.append(f'<text class="d" x="{label + length + 6:.1f}" y="{y + 10}">{value:.4g}</text>')
    return _page(title, label + room + 80, 60 + ROW * len(rows), body)


def tradeoff(
    title: str,
    points: Sequence[tuple[float, float]],
    measured: Sequence[tuple[float, float]],
    chosen: tuple[float, float],
) -> str:
    """Divergence (nats per token, logarithmic) over bits per weight.

    Args:
        title: Above the chart.
        points: The predicted curve.
        measured: Dots.
        chosen: The marked point.
    """
    left, top, width, height = 72, 44, 620, 320
    every = [*points, *measured, chosen]
    shown = [kl for _, kl in every if kl > 0] or [1.0]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    high = high if high > low else low + 1
    first, last = math.floor(min(b for b, _ in every)), math.ceil(max(b for b, _ in every))
    last = last if last > first else first + 1

    def at(bits: float, kl: float) -> tuple[float, float]:
        down = (high - max(math.log10(kl), low)) / (high - low) if kl > 0 else 1.0
        return left + width * (bits - first) / (last - first), top + height * down

    body = []
    for power in range(low, high + 1):
        y = at(first, 10.0**power)[1]
        body.append(f'<path class="g" d="M{left} {y:.1f}H{left + width}"/>')
        body.append(
            f'<text class="d" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
        )
    for bits in range(first, last + 1):
        x = at(bits, 0)[0]
        body.append(f'<text class="d" x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{bits}</text>')
    line = "L".join("{:.1f} {:.1f}".format(*at(*point)) for point in points)
    body.append(f'<path class="l" d="M{line}"/>')
    body += ['<circle class="b" cx="{:.1f}" cy="{:.1f}" r="4"/>'.format(*at(*point)) for point in measured]
    x, y = at(*chosen)
    body.append(f'<circle class="c" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
    body.append(
        f'<text x="{x + 10:.1f}" y="{y - 8:.1f}">chosen: {chosen[0]:.2f} bits, KL {chosen[1]:.3g}</text>'
    )
    body.append(f'<path class="a" d="M{left} {top}V{top + height}H{left + width}" fill="none"/>')
    foot = top + height + 40
    body.append(
        f'<text class="d" x="{left}" y="{foot}">bits per weight, scales counted, against KL in nats per token;'
        " line predicted, dots measured rounding to nearest</text>"
    )
    return _page(title, left + width + 40, foot + 16, body)


def _page(title: str, width: int, height: int, body: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    start = [
        head,
        f"<title>{escape(title)}</title>",
        STYLE,
        '<rect class="p" width="100%" height="100%" fill="#fff"/>',
    ]
    return (
        "\n".join([*start, f'<text class="t" x="16" y="24">{escape(title)}</text>', *body, "</svg>"]) + "\n"
    )
