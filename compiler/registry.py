"""Where passes, patterns, schemes, readers of data sets and the like are found: entry points, ours like anybody's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import Refused

GROUPS = ("passes", "presets", "recipes", "patterns", "schemes", "targets", "calibration_readers")


@lru_cache
def names(group: str) -> dict[str, EntryPoint]:
    """Name to entry point of one group, nothing imported. Two packages with one name are an error."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=f"qc.{group}"):
        other = found.get(point.name)
        if other is not None and other.value != point.value:
            owners = " and ".join(sorted({package(other), package(point)}))
            raise Refused(
                f"{group[:-1]} {point.name!r} is registered twice, by {owners}: uninstall one of them"
            )
        found[point.name] = point
    if not found:
        raise Refused(f"no {group} are registered: qc is not installed (pip install -e . in its directory)")
    return dict(sorted(found.items()))


def package(point: EntryPoint) -> str:
    """The distribution that registers an entry point."""
    return point.dist.name if point.dist is not None else point.value.split(".")[0]


def get(group: str, name: str) -> Any:
    """Import what is registered under a name; Refused with suggestions when there is no such name."""
    point = names(group).get(name)
    if point is None:
        raise Refused(
            unknown(group[:-1].removesuffix("e") if group == "passes" else group[:-1], name, names(group))
        )
    return point.load()


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """``unknown pass 'quarrot'; did you mean quarot?``, or the list of what there is."""
    known = sorted(known)
    found = close(name, known)
    hint = f"did you mean {' or '.join(found)}?" if found else f"there are {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"


def close(name: str, known: Iterable[str]) -> list[str]:
    """The one or two names most like ``name``, if any is like it at all."""
    return difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
