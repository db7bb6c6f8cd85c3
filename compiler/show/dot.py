"""A diagram in the DOT language, and as a picture that Graphviz makes of it: https://graphviz.org/doc/info/lang.html"""

from __future__ import annotations

from ..errors import Failed, Refused
from .diagram import Diagram
from .mermaid import words
from .palette import FILLS, INK, MUTED, WIRE, fill_of, mark_of

SHAPES = {"join": "circle", "inserted": "hexagon", "stub": "cds", "attention": "box", "alike": "box3d"}


def dot(diagram: Diagram) -> str:
    """The diagram as a directed graph in DOT."""
    lines = [
        "digraph qc {",
        f"  label={_quoted(diagram.title)}; labelloc=t; labeljust=l; rankdir=TB; nodesep=0.35; ranksep=0.4;",
        f'  fontname="Helvetica"; fontcolor="{INK.light}";',
        f'  node [fontname="Helvetica", fontsize=11, style="filled,rounded", shape=box, fontcolor="{INK.light}"];',
        f'  edge [color="{WIRE.light}", arrowsize=0.7, fontname="Helvetica", fontsize=9, fontcolor="{MUTED.light}"];',
    ]
    for box in diagram.boxes:
        fill = FILLS[fill_of(box.kind, box.bits)]
        shape = SHAPES.get(box.kind, "box")
        style = "filled" if shape in ("circle", "hexagon", "cds") else "filled,rounded"
        style += ",dashed" if box.kind in ("input", "output") else ""
        edge = fill.edge.light + ("55" if box.id in diagram.dimmed else "")
        lines.append(
            f"  {_quoted(box.id)} [label={_quoted(*words(box))}, shape={shape}, style={_quoted(style)},"
            f' fillcolor="{fill.area.light}", color="{edge}"];'
        )
    owner = {i: mark for mark in reversed(diagram.marks) for i in mark.arrows}
    for i, arrow in enumerate(diagram.arrows):
        drawn = f', color="{mark_of(owner[i].pattern).light}", penwidth=2.4' if i in owner else ""
        lines.append(
            f"  {_quoted(arrow.source)} -> {_quoted(arrow.target)} [tooltip={_quoted(arrow.type)}{drawn}];"
        )
    for k, mark in enumerate(diagram.marks):
        colour = mark_of(mark.pattern).light
        lines.append(
            f'  mark{k} [label={_quoted(mark.caption)}, shape=note, style=filled, fillcolor="#ffffff",'
            f' color="{colour}", fontcolor="{colour}"];'
        )
        lines.append(
            f"  mark{k} -> {_quoted(mark.boxes[0])} [style=dotted, arrowhead=none, constraint=false,"
            f' color="{colour}"];'
        )
    return "\n".join([*lines, "}", ""])


def png(diagram: Diagram) -> bytes:
    """The diagram as a PNG picture, drawn by Graphviz.

    Raises:
        Refused: Graphviz is not there: its Python package, or its program ``dot``.
    """
    try:
        import graphviz
    except ImportError:
        raise Refused(
            "png is drawn by Graphviz, and its Python package is not installed: pip install 'qc[png]', and the"
            " program dot (apt install graphviz, brew install graphviz); or take --format svg, which needs neither"
        ) from None
    try:
        return graphviz.Source(dot(diagram)).pipe(format="png")
    except graphviz.ExecutableNotFound:
        raise Refused(
            "png is drawn by Graphviz, and its program dot is not installed: apt install graphviz (or brew install"
            " graphviz); or take --format svg, which does not need it"
        ) from None
    except graphviz.CalledProcessError as error:
        raise Failed(f"dot could not draw this diagram: {str(error).strip()}") from None


def _quoted(*lines: str) -> str:
    escaped = (line.replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'
