"""Marks: which boxes and arrows of a diagram a match of a pattern lies on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..contract import Rewrite
from .diagram import Diagram, Mark
from .matched import Matched


def marks(
    diagram: Diagram, place: Mapping[str, str], matches: Iterable[Matched], rewrites: Sequence[Rewrite]
) -> Diagram:
    """The diagram with a mark for every match of which at least two boxes are drawn, or the one thing that it names.

    Args:
        diagram: Boxes and arrows.
        place: Id of the box in which a module or a value is drawn, by its name.
        matches: What is to be highlighted.
        rewrites: What passes did so far.
    """
    found = []
    for match in matches:
        ids = tuple(dict.fromkeys(place[name] for name in match.names if name in place))
        if len(ids) > 1 or (ids and len(match.names) == 1):
            by = _passes(match, rewrites)
            caption = match.title + (f": {', '.join(by)}" if by else "")
            flow = {place[name] for name in match.flow if name in place}
            way = tuple(i for i, arrow in enumerate(diagram.arrows) if arrow.source in flow)
            found.append(
                Mark(
                    match.pattern,
                    caption,
                    ids,
                    way if match.flow else _between(diagram, ids),
                    bool(match.flow),
                )
            )
    return replace(diagram, marks=(*diagram.marks, *found))


def only(diagram: Diagram) -> Diagram:
    """The same with every box that no mark is on drawn pale."""
    lit = {id for mark in diagram.marks for id in mark.boxes}
    lit |= {
        end
        for m in diagram.marks
        for i in m.arrows
        for end in (diagram.arrows[i].source, diagram.arrows[i].target)
    }
    return replace(diagram, dimmed=frozenset(box.id for box in diagram.boxes) - lit)


def _passes(match: Matched, rewrites: Sequence[Rewrite]) -> tuple[str, ...]:
    """Names of the passes that rewrote a match, in order."""
    own = set(match.names)
    return tuple(
        dict.fromkeys(
            rewrite.pass_name
            for rewrite in rewrites
            if rewrite.pattern.replace("-", "_") == match.pattern and own.intersection(rewrite.modules)
        )
    )


def _between(diagram: Diagram, ids: Sequence[str]) -> tuple[int, ...]:
    """Arrows on the ways from one of these boxes to another, over boxes that hold no weights of their own."""
    wanted = set(ids)
    crossing = {
        box.id for box in diagram.boxes if box.kind in ("op", "join", "attention", "inserted", "stub")
    }
    leaving: dict[str, list[int]] = {}
    for i, arrow in enumerate(diagram.arrows):
        leaving.setdefault(arrow.source, []).append(i)
    reaches: dict[str, bool] = {}

    def leads(id: str) -> bool:
        """Whether a way from here over such boxes ends at a wanted one."""
        if id in wanted:
            return True
        if id not in reaches:
            reaches[id] = id in crossing and any(leads(diagram.arrows[i].target) for i in leaving.get(id, ()))
        return reaches[id]

    found: set[int] = set()
    queue, seen = list(wanted), set(wanted)
    while queue:
        for i in leaving.get(queue.pop(), ()):
            target = diagram.arrows[i].target
            if leads(target):
                found.add(i)
                if target not in seen:
                    seen.add(target)
                    queue.append(target)
    return tuple(sorted(found))
