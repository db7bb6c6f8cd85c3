"""A program as one HTML page that needs nothing from outside: the whole model, every run of blocks, and its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .diagram import Diagram
from .palette import INK, MUTED, PAPER, WIRE
from .svg import STYLE, svg


@dataclass(frozen=True)
class Section:
    """A drawing with its heading and the rows behind it."""

    diagram: Diagram
    text: str = ""


def page(title: str, sections: Sequence[Section]) -> str:
    """The page: a list of its sections, then each one with its drawing and, folded, its text."""
    links = "".join(
        f'<li><a href="#part-{i}">{escape(section.diagram.title)}</a></li>'
        for i, section in enumerate(sections)
    )
    body = "\n".join(_section(i, section) for i, section in enumerate(sections))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<style>{STYLE}{_PAGE}</style>\n</head>\n<body>\n'
        f"<h1>{escape(title)}</h1>\n<nav><ol>{links}</ol></nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(i: int, section: Section) -> str:
    text = (
        f"<details><summary>The rows as text</summary><pre>{escape(section.text)}</pre></details>\n"
        if section.text
        else ""
    )
    return (
        f'<section id="part-{i}">\n<h2>{escape(section.diagram.title)}</h2>\n'
        f'<div class="drawing" tabindex="0" role="group" aria-label="{escape(section.diagram.title)}">\n'
        f"{svg(section.diagram, style=False)}</div>\n{text}</section>"
    )


_PAGE = (
    f"body{{margin:0 auto;padding:1.5rem;max-width:90rem;font:16px/1.5 system-ui,sans-serif;color:{INK.light};"
    f"background:{PAPER.light}}}h1{{font-size:1.5rem}}h2{{font-size:1.1rem;margin-top:2.5rem}}"
    f"nav ol{{padding-left:1.4rem;color:{MUTED.light}}}a{{color:inherit}}"
    f".drawing{{overflow:auto;border:1px solid {WIRE.light};border-radius:8px}}"
    ".drawing svg{display:block;margin:0 auto}.drawing .qc-head{display:none}"
    "pre{overflow:auto;font-size:12px;line-height:1.5}summary{cursor:pointer;padding:.6rem 0}"
    f"@media (prefers-color-scheme:dark){{body{{color:{INK.dark};background:{PAPER.dark}}}"
    f"nav ol{{color:{MUTED.dark}}}.drawing{{border-color:{WIRE.dark}}}}}"
)
