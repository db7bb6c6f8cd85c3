"""The errors of layers as a picture: an SVG file that needs nothing to be seen."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from .errors import Refused
from .layer_error import LayerError

_WIDE, _HIGH, _LEFT, _TOP, _BOTTOM = 960, 360, 64, 40, 40
_OWN, _REACHED = "#4477aa", "#cc6677"


def layer_plot(errors: Sequence[LayerError], title: str) -> str:
    """An SVG with a bar per layer for its own error and a line for the error that is reached there, in percent."""
    top = max((max(e.own, e.reached) for e in errors), default=0.0) or 1.0
    step = (_WIDE - _LEFT - 16) / max(len(errors), 1)
    inner = _HIGH - _TOP - _BOTTOM

    def y(value: float) -> float:
        return _TOP + inner * (1 - value / top)

    def x(index: float) -> float:
        return _LEFT + step * index

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDE}" height="{_HIGH}" viewBox="0 0 {_WIDE} {_HIGH}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDE}" height="{_HIGH}" fill="white"/>',
        f'<text x="{_LEFT}" y="18">{escape(title)}</text>',
        f'<text x="{_WIDE - 16}" y="18" text-anchor="end"><tspan fill="{_OWN}">own error of a layer</tspan>'
        f' <tspan fill="{_REACHED}">reached there</tspan></text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDE - 16}" y1="{y(share * top):.1f}" y2="{y(share * top):.1f}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{y(share * top) + 4:.1f}" text-anchor="end">{share * top:.2%}</text>'
        )
    for index, e in enumerate(errors):
        parts.append(
            f'<rect x="{x(index + 0.15):.1f}" y="{y(e.own):.1f}" width="{0.7 * step:.1f}"'
            f' height="{_TOP + inner - y(e.own):.1f}" fill="{_OWN}"><title>{escape(e.layer)}: own {e.own:.3%},'
            f" reached {e.reached:.3%}</title></rect>"
        )
        if index % max(1, len(errors) // 16) == 0:
            parts.append(
                f'<text x="{x(index + 0.5):.1f}" y="{_HIGH - 18}" text-anchor="middle">{index}</text>'
            )
    points = " ".join(f"{x(index + 0.5):.1f},{y(e.reached):.1f}" for index, e in enumerate(errors))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{_REACHED}" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>", ""])


def save_plot(errors: Sequence[LayerError], title: str, path: str | Path) -> None:
    """Write the picture; Refused where the file cannot be made, or is not called ``.svg``."""
    path = Path(path)
    if path.suffix != ".svg":
        raise Refused(f"--plot {path}: the picture is an SVG; give a file that ends in .svg")
    try:
        path.write_text(layer_plot(errors, title), encoding="utf-8")
    except OSError as error:
        raise Refused(f"--plot {path}: cannot be written: {error.strerror or error}") from error
